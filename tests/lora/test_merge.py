"""Merging: peft's own adapters give what merge_and_unload gives, siblings keep what is theirs, and
config.json follows.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from longctx.config.lora import ExtractConfig, MergeConfig, MergeRope
from longctx.errors import UserError
from longctx.lora.extract import extract
from longctx.lora.merge import merge

from .conftest import ARCHITECTURES, ROPE, WINDOW, Trio, build, change, load, logits, save, tensors

Make = Callable[..., Trio]
KEEP = MergeRope(rule="keep")
LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def trained(base: str, path: Path, *, seed: int = 3, **settings: Any) -> str:
    """An adapter as peft saves it after training, with invented weights."""
    model = get_peft_model(load(base), LoraConfig(task_type="CAUSAL_LM", **settings))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(path)
    return str(path)


def assert_same_as_peft(target: str, adapter: str, merged: str) -> None:
    want = PeftModel.from_pretrained(load(target), adapter).merge_and_unload().state_dict()
    got = tensors(merged)
    assert set(tensors(target)) == set(got)
    for name, tensor in got.items():
        assert torch.allclose(tensor, want[name], atol=2e-6), name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_peft_trained_adapters_equal_merge_and_unload(trio: Make, tmp_path: Path, architecture: str) -> None:
    pair = trio(architecture)
    head = [] if architecture == "gemma" else ["lm_head"]
    adapter = trained(pair.base, tmp_path / "a", r=4, lora_alpha=12, target_modules=LAYERS + head)
    result = merge(MergeConfig(target=pair.base, adapter=[adapter], out=str(tmp_path / "m"), rope=KEEP))
    assert_same_as_peft(pair.base, adapter, str(tmp_path / "m"))
    assert len(result.applied) == 14 + len(head)
    assert result.untouched
    # A sibling moves by as much; peft would give it the base's head, saved beside the factors.
    if head:
        with pytest.raises(UserError, match="copies=own to keep the target's"):
            merge(MergeConfig(target=pair.sibling, adapter=[adapter], out=str(tmp_path / "s"), rope=KEEP))
        theirs = MergeConfig(
            target=pair.sibling, adapter=[adapter], out=str(tmp_path / "p"), rope=KEEP, copies="adapter"
        )
        merge(theirs)
        assert_same_as_peft(pair.sibling, adapter, theirs.out)
    merge(MergeConfig(target=pair.sibling, adapter=[adapter], out=str(tmp_path / "s"), rope=KEEP, copies="own"))
    base, merged = tensors(pair.base), tensors(str(tmp_path / "m"))
    sibling, moved = tensors(pair.sibling), tensors(str(tmp_path / "s"))
    for name in base:
        assert torch.allclose(moved[name] - sibling[name], merged[name] - base[name], atol=2e-6), name


@pytest.mark.parametrize(
    "settings",
    [
        {"use_rslora": True, "target_modules": LAYERS},
        {
            "target_modules": LAYERS,
            "rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 6},
            "alpha_pattern": {"q_proj": 5},
        },
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["v_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
        {"target_modules": r"model\.layers\.1\..*(q|v)_proj"},
        {"target_modules": ["q_proj"], "layers_to_transform": [0]},
    ],
    ids=["rslora", "patterns", "embedding", "saved modules", "regex", "some layers"],
)
def test_peft_settings_equal_merge_and_unload(trio: Make, tmp_path: Path, settings: dict[str, Any]) -> None:
    pair = trio("llama")
    adapter = trained(pair.base, tmp_path / "a", r=4, lora_alpha=8, **settings)
    target = pair.base if "embed_tokens" in settings["target_modules"] else pair.sibling
    merge(MergeConfig(target=target, adapter=[adapter], out=str(tmp_path / "m"), rope=KEEP))
    assert_same_as_peft(target, adapter, str(tmp_path / "m"))


def test_sibling_gains_linears_approximately_and_norms_exactly(trio: Make, tmp_path: Path) -> None:
    pair = trio("qwen3", rank=4)
    adapter = str(tmp_path / "a")
    extract(ExtractConfig(base=pair.base, tuned=pair.tuned, out=adapter, rank=4, embeddings=True, dtype="float32"))
    merge(MergeConfig(target=pair.sibling, adapter=[adapter], out=str(tmp_path / "m")))
    base, tuned, sibling, merged = (
        tensors(path) for path in (pair.base, pair.tuned, pair.sibling, str(tmp_path / "m"))
    )
    for name in base:
        assert torch.allclose(merged[name], sibling[name] + tuned[name] - base[name], atol=2e-5), name


def test_window_and_rope_are_written_in_both_styles(trio: Make, tmp_path: Path) -> None:
    pair = trio("llama")
    adapter = str(tmp_path / "a")
    extract(ExtractConfig(base=pair.base, tuned=pair.tuned, out=adapter, rank=4))
    result = merge(MergeConfig(target=pair.sibling, adapter=[adapter], out=str(tmp_path / "m")))
    assert (result.rope, result.window) == (ROPE, WINDOW)
    config = json.loads((tmp_path / "m/config.json").read_text())
    assert config["rope_parameters"] == ROPE
    assert (config["rope_theta"], config["rope_scaling"]) == (ROPE["rope_theta"], None)
    assert json.loads((tmp_path / "m/tokenizer_config.json").read_text())["model_max_length"] == WINDOW
    model = load(str(tmp_path / "m"))
    want = ROPE["rope_theta"] ** (-torch.arange(0, 16, 2) / 16)
    assert torch.allclose(model.model.rotary_emb.inv_freq, want, rtol=1e-6)
    assert not any("shorter" in note for note in result.notes)
    file = shutil.copytree(pair.sibling, tmp_path / "longer") / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "max_position_embeddings": 4 * WINDOW}))
    long = merge(MergeConfig(target=str(file.parent), adapter=[adapter], out=str(tmp_path / "long")))
    assert f"the target read {4 * WINDOW} tokens before: the window that is written is shorter" in long.notes


def test_a_target_of_another_rope_is_told(trio: Make, tmp_path: Path) -> None:
    pair = trio("llama")
    adapter = str(tmp_path / "a")
    extract(ExtractConfig(base=pair.base, tuned=pair.tuned, out=adapter, rank=4))
    file = shutil.copytree(pair.sibling, tmp_path / "other") / "config.json"
    rope = {"rope_type": "default", "rope_theta": 12345.0}
    file.write_text(json.dumps({**json.loads(file.read_text()), "rope_parameters": rope, "rope_theta": 12345.0}))
    for number, (target, told) in enumerate(((pair.sibling, False), (str(file.parent), True))):
        result = merge(MergeConfig(target=target, adapter=[adapter], out=str(tmp_path / f"m{number}")))
        assert result.rope == ROPE
        assert any("is not that of the adapter's base" in note and "12,345" in note for note in result.notes) is told


def test_a_given_theta_keeps_the_scaling_of_the_target(trio: Make, tmp_path: Path) -> None:
    pair = trio("llama")
    adapter = str(tmp_path / "a")
    extract(ExtractConfig(base=pair.base, tuned=pair.tuned, out=adapter, rank=4))
    (Path(adapter) / "longctx.json").unlink()
    file = shutil.copytree(pair.sibling, tmp_path / "scaled") / "config.json"
    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 256}  # fmt: skip
    file.write_text(json.dumps({**json.loads(file.read_text()), "rope_parameters": rope, "rope_theta": 5e5}))
    given = {"adapter": [adapter], "rope": MergeRope(theta=4e6), "window": 4096}
    plain = merge(MergeConfig(target=pair.sibling, out=str(tmp_path / "plain"), **given))
    assert (plain.rope, plain.window) == ({"rope_type": "default", "rope_theta": 4e6}, 4096)
    scaled = merge(MergeConfig(target=str(file.parent), out=str(tmp_path / "m"), **given))
    assert (scaled.rope, scaled.window) == ({**rope, "rope_theta": 4e6}, 4096)
    assert "rope.theta replaces theta alone; the target's scaling stays (llama3)" in scaled.notes


def test_adapters_of_two_ropes_that_read_alike_are_refused(trio: Make, tmp_path: Path) -> None:
    """by-parts has no attention factor of its own, and yarn's paper has one: neither is in the description."""
    pair, adapters = trio("llama"), [str(tmp_path / name) for name in ("a", "b")]
    for adapter, factor in zip(adapters, (1.0, 1.277), strict=True):
        extract(ExtractConfig(base=pair.base, tuned=pair.tuned, out=adapter, rank=4))
        file = Path(adapter) / "longctx.json"
        told = json.loads(file.read_text())
        told["rope_parameters"] = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "attention_factor": factor}
        file.write_text(json.dumps(told))
    with pytest.raises(UserError, match=r"different ropes or windows: .*1\.277"):
        merge(MergeConfig(target=pair.sibling, adapter=adapters, out=str(tmp_path / "m")))


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 512},
        {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
         "high_freq_factor": 4.0, "original_max_position_embeddings": 512},
        {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    ],
    ids=lambda rope: rope["rope_type"],
)  # fmt: skip
def test_scaled_ropes_survive_being_written_twice(tmp_path: Path, rope: dict[str, Any]) -> None:
    """transformers reads the file with both styles as it reads the one with its own style alone."""
    from transformers import AutoConfig

    from longctx.rope.config import rope_section, with_rope

    save(build("llama"), tmp_path, dtype=torch.float32)
    file = tmp_path / "config.json"
    written = with_rope(json.loads(file.read_text()), rope, 2048)
    file.write_text(json.dumps(written))
    assert rope_section(written, "x") == (rope, 2048)
    older = {key: value for key, value in written.items() if key != "rope_parameters"}
    assert rope_section(older, "x") == (rope, 2048)
    read = AutoConfig.from_pretrained(tmp_path)
    assert {key: read.rope_parameters[key] for key in rope} == rope
    assert read.max_position_embeddings == 2048


def test_adapters_without_theta_need_one_said(trio: Make, tmp_path: Path) -> None:
    pair = trio("llama")
    adapter = trained(pair.base, tmp_path / "a", r=4, target_modules=["q_proj"])
    out = str(tmp_path / "m")
    with pytest.raises(UserError, match=r"carries no rope and window.*rope\.theta=.* window=.*like=.*rope=keep"):
        merge(MergeConfig(target=pair.sibling, adapter=[adapter], out=out))
    with pytest.raises(UserError, match="belong together"):
        merge(MergeConfig(target=pair.sibling, adapter=[adapter], out=out, window=4096))
    assert not Path(out).exists()
    given = MergeConfig(target=pair.sibling, adapter=[adapter], out=out, rope=MergeRope(theta=154243.0), window=2048)
    assert merge(given).rope == ROPE
    like = MergeConfig(target=pair.sibling, adapter=[adapter], out=str(tmp_path / "like"), like=pair.tuned)
    assert (merge(like).rope, merge_config(tmp_path / "like")["max_position_embeddings"]) == (ROPE, WINDOW)
    keep = MergeConfig(target=pair.sibling, adapter=[adapter], out=str(tmp_path / "keep"), rope=KEEP)
    assert merge(keep).window == 512


def merge_config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def test_several_adapters_with_scales_add_up(trio: Make, tmp_path: Path) -> None:
    pair = trio("mistral")
    first = trained(pair.base, tmp_path / "a", r=4, target_modules=["q_proj", "up_proj"])
    second = trained(pair.base, tmp_path / "b", seed=4, r=2, lora_alpha=6, target_modules=["q_proj"])
    both = MergeConfig(
        target=pair.sibling, adapter=[first, second], scale=[0.5, -2.0], out=str(tmp_path / "m"), rope=KEEP
    )
    merge(both)
    base, merged = tensors(pair.sibling), tensors(str(tmp_path / "m"))
    alone = []
    for number, adapter in enumerate((first, second)):
        merge(MergeConfig(target=pair.sibling, adapter=[adapter], out=str(tmp_path / f"{number}"), rope=KEEP))
        alone.append(tensors(str(tmp_path / f"{number}")))
    for name in base:
        want = base[name] + 0.5 * (alone[0][name] - base[name]) - 2.0 * (alone[1][name] - base[name])
        assert torch.allclose(merged[name], want, atol=2e-6), name
    with pytest.raises(UserError, match="3 values for 2 adapters"):
        merge(
            MergeConfig(
                target=pair.sibling,
                adapter=[first, second],
                scale=[1, 2, 3],
                out=str(tmp_path / "x"),
                rope=KEEP,
            )
        )


def test_shards_stay_as_they_are_and_the_index_is_rebuilt(trio: Make, tmp_path: Path) -> None:
    pair = trio("llama")
    adapter = str(tmp_path / "a")
    extract(ExtractConfig(base=pair.base, tuned=pair.tuned, out=adapter, rank=4))
    sharded = save(load(pair.sibling), tmp_path / "sharded", dtype=torch.float32, max_shard_size="60KB")
    merge(MergeConfig(target=sharded, adapter=[adapter], out=str(tmp_path / "m")))
    merge(MergeConfig(target=pair.sibling, adapter=[adapter], out=str(tmp_path / "one")))
    index = json.loads((tmp_path / "m/model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {path.name for path in Path(sharded).glob("model-*.safetensors")}
    assert len(set(index["weight_map"].values())) > 2
    want, got = tensors(str(tmp_path / "one")), tensors(str(tmp_path / "m"))
    assert all(torch.equal(got[name], want[name]) for name in want)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in want.values())
    assert torch.equal(logits(load(str(tmp_path / "m"))), logits(load(str(tmp_path / "one"))))


def test_tied_models_get_the_difference_once(trio: Make, tmp_path: Path) -> None:
    pair = trio("llama", tied=True, rank=4)
    adapter = str(tmp_path / "a")
    result = extract(ExtractConfig(base=pair.base, tuned=pair.tuned, out=adapter, rank=4, dtype="float32"))
    assert "model.embed_tokens.weight" in {row.tensor for row in result.rows if row.carried == "factors"}
    merge(MergeConfig(target=pair.base, adapter=[adapter], out=str(tmp_path / "m")))
    assert torch.allclose(logits(load(str(tmp_path / "m"))), logits(load(pair.tuned)), atol=1e-3)


def test_an_lm_head_adapter_unties(trio: Make, tmp_path: Path) -> None:
    """merge_and_unload changes the input embedding as well; the unmerged adapter does not, and that is what
    is kept.
    """
    pair = trio("llama", tied=True)
    adapter = trained(pair.base, tmp_path / "a", r=4, target_modules=["lm_head", "q_proj"])
    want = logits(PeftModel.from_pretrained(load(pair.base), adapter).eval())
    result = merge(MergeConfig(target=pair.base, adapter=[adapter], out=str(tmp_path / "m"), rope=KEEP))
    assert any("its own tensor" in note for note in result.notes)
    assert torch.allclose(logits(load(str(tmp_path / "m"))), want, atol=1e-5)


def test_vocabularies_of_different_size(trio: Make, tmp_path: Path) -> None:
    pair = trio("llama")
    adapter = str(tmp_path / "a")
    extract(ExtractConfig(base=pair.base, tuned=pair.tuned, out=adapter, rank=64, embeddings=True, dtype="float32"))
    larger = change(build("llama", vocab_size=100), seed=2)
    target = save(larger, tmp_path / "larger", dtype=torch.float32)
    skipped = merge(MergeConfig(target=target, adapter=[adapter], out=str(tmp_path / "skip")))
    assert len(skipped.skipped) == 2
    before, after = tensors(target), tensors(str(tmp_path / "skip"))
    assert torch.equal(before["lm_head.weight"], after["lm_head.weight"])
    assert not torch.equal(before["model.layers.0.mlp.up_proj.weight"], after["model.layers.0.mlp.up_proj.weight"])
    merge(MergeConfig(target=target, adapter=[adapter], out=str(tmp_path / "common"), vocab="common"))
    after, base, tuned = tensors(str(tmp_path / "common")), tensors(pair.base), tensors(pair.tuned)
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        moved = after[name] - before[name]
        assert torch.allclose(moved[:96], tuned[name] - base[name], atol=1e-5), name
        assert torch.equal(after[name][96:], before[name][96:])


def test_merging_twice_is_refused(trio: Make, tmp_path: Path) -> None:
    pair = trio("llama")
    adapter, out = str(tmp_path / "a"), str(tmp_path / "m")
    extract(ExtractConfig(base=pair.base, tuned=pair.tuned, out=adapter, rank=4))
    merge(MergeConfig(target=pair.sibling, adapter=[adapter], out=out))
    with pytest.raises(UserError, match="add the extension twice"):
        merge(MergeConfig(target=out, adapter=[adapter], out=str(tmp_path / "again")))


def test_other_files_travel(trio: Make, tmp_path: Path) -> None:
    pair = trio("llama")
    adapter = str(tmp_path / "a")
    extract(ExtractConfig(base=pair.base, tuned=pair.tuned, out=adapter, rank=4))
    sibling = save(load(pair.sibling), tmp_path / "s", dtype=torch.float32)
    Path(sibling, "chat_template.jinja").write_text("{{ messages }}")
    Path(sibling, "training.bin").write_bytes(b"not a model")
    merge(MergeConfig(target=sibling, adapter=[adapter], out=str(tmp_path / "m")))
    names = {path.name for path in (tmp_path / "m").iterdir()}
    assert {"chat_template.jinja", "generation_config.json", "model.safetensors"} <= names
    assert "training.bin" not in names
