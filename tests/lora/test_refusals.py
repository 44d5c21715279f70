"""Bad input: every mistake is one UserError that names it, and no output is written."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file

from longctx.config.lora import ExtractConfig, MergeConfig, MergeRope
from longctx.errors import UserError
from longctx.lora.extract import extract
from longctx.lora.match import Match
from longctx.lora.merge import merge

from .conftest import Trio, build, change, save

Make = Callable[..., Trio]


def copy(path: str, to: Path) -> Path:
    shutil.copytree(path, to)
    return to


def edit(folder: Path, file: str = "config.json", **values: Any) -> str:
    path = folder / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    return str(folder)


def rewrite(folder: Path, change_tensors: Callable[[dict[str, torch.Tensor]], None]) -> str:
    weights = load_file(folder / "model.safetensors")
    change_tensors(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


def extract_refusal(tmp_path: Path, base: str, tuned: str, **settings: Any) -> str:
    """What the refusal says; nothing may have appeared in the folder."""
    before = {path.name for path in tmp_path.iterdir()}
    with pytest.raises(UserError) as raised:
        extract(ExtractConfig(base=base, tuned=tuned, out=str(tmp_path / "out"), rank=4, **settings))
    assert {path.name for path in tmp_path.iterdir()} == before
    return str(raised.value)


def test_another_architecture(trio: Make, tmp_path: Path) -> None:
    pair = trio("llama")
    other = save(change(build("mistral"), seed=1), tmp_path / "t", dtype=torch.float32)
    assert re.search("model_type llama / mistral", extract_refusal(tmp_path, pair.base, other))


def test_head_layout_with_equal_shapes(trio: Make, tmp_path: Path) -> None:
    """8 heads of 8 have matrices of the same shape as 4 of 16, but another meaning."""
    pair = trio("llama")
    other = edit(copy(pair.tuned, tmp_path / "t"), num_attention_heads=8, num_key_value_heads=4, head_dim=8)
    assert re.search("num_attention_heads 4 / 8", extract_refusal(tmp_path, pair.base, other))


def test_shapes(trio: Make, tmp_path: Path) -> None:
    pair = trio("llama")

    def narrow(weights: dict[str, torch.Tensor]) -> None:
        weights["model.layers.0.mlp.up_proj.weight"] = weights["model.layers.0.mlp.up_proj.weight"][:80].contiguous()
        del weights["model.norm.weight"]

    other = rewrite(copy(pair.tuned, tmp_path / "t"), narrow)
    assert re.search(
        r"only in base: model\.norm\.weight.*of other shape: .*up_proj", extract_refusal(tmp_path, pair.base, other)
    )


def test_tokenizers(trio: Make, tmp_path: Path) -> None:
    pair = trio("llama")
    base, tuned = copy(pair.base, tmp_path / "b"), copy(pair.tuned, tmp_path / "t")
    vocabulary = {"model": {"vocab": {"a": 0, "b": 1}}, "added_tokens": [], "version": "1.0"}
    (base / "tokenizer.json").write_text(json.dumps(vocabulary))
    (tuned / "tokenizer.json").write_text(json.dumps({**vocabulary, "version": "2.0"}, indent=1))
    extract(ExtractConfig(base=str(base), tuned=str(tuned), out=str(tmp_path / "fine"), rank=4))
    vocabulary["added_tokens"] = [{"content": "b", "id": 1}]  # a token that is special as well keeps its row
    (tuned / "tokenizer.json").write_text(json.dumps(vocabulary))
    extract(ExtractConfig(base=str(base), tuned=str(tuned), out=str(tmp_path / "special"), rank=4))
    vocabulary["model"], vocabulary["added_tokens"] = {"vocab": {"a": 1, "c": 0}}, []
    (tuned / "tokenizer.json").write_text(json.dumps(vocabulary))
    said = extract_refusal(tmp_path, str(base), str(tuned))
    assert "different vocabularies (tokenizer.json: token 'a' 0 / 1, 'b' 1 / none, 'c' none / 0)" in said


def test_swapped(trio: Make, tmp_path: Path) -> None:
    pair = trio("llama")
    assert re.search(r"look swapped.*reads 2048 tokens.*reads 512", extract_refusal(tmp_path, pair.tuned, pair.base))
    extract(ExtractConfig(base=pair.tuned, tuned=pair.base, out=str(tmp_path / "meant"), rank=4, allow_shorter=True))


def test_identical(trio: Make, tmp_path: Path) -> None:
    pair = trio("llama")
    assert re.search("hold the same numbers in all 21 tensors", extract_refusal(tmp_path, pair.base, pair.base))

    def only_a_norm(weights: dict[str, torch.Tensor]) -> None:
        weights["model.norm.weight"] += 1

    other = rewrite(copy(pair.base, tmp_path / "t"), only_a_norm)
    assert re.search("only norms, biases or embeddings differ", extract_refusal(tmp_path, pair.base, other))


def test_quantized(trio: Make, tmp_path: Path) -> None:
    pair = trio("llama")
    said = edit(copy(pair.tuned, tmp_path / "said"), quantization_config={"quant_method": "gptq", "bits": 4})
    assert re.search(r"quantized \(gptq", extract_refusal(tmp_path, pair.base, said))

    def codes(weights: dict[str, torch.Tensor]) -> None:
        weights["model.layers.0.mlp.up_proj.weight"] = weights["model.layers.0.mlp.up_proj.weight"].to(torch.int8)

    unsaid = rewrite(copy(pair.tuned, tmp_path / "unsaid"), codes)
    assert re.search("stored as I8", extract_refusal(tmp_path, pair.base, unsaid))
    with pytest.raises(UserError, match="quantized"):
        merge(MergeConfig(target=said, adapter=["x"], out=str(tmp_path / "out")))


def test_missing_and_corrupt_shards(trio: Make, tmp_path: Path) -> None:
    pair = trio("llama")
    sharded = Path(save(change(build("llama"), seed=1), tmp_path / "t", dtype=torch.float32, max_shard_size="60KB"))
    victim = sorted(sharded.glob("model-*.safetensors"))[1]
    content = victim.read_bytes()
    victim.unlink()
    assert re.search(f"shard {victim.name} is missing", extract_refusal(tmp_path, pair.base, str(sharded)))
    victim.write_bytes(content[:-100])
    assert re.search(f"{victim.name} is truncated", extract_refusal(tmp_path, pair.base, str(sharded)))
    victim.write_bytes(b"\xff" * len(content))
    assert re.search(
        f"{victim.name} is not a whole safetensors file", extract_refusal(tmp_path, pair.base, str(sharded))
    )
    victim.write_bytes(content[:8] + b"#" * 40 + content[48:])
    assert re.search(f"header of {victim.name} is damaged", extract_refusal(tmp_path, pair.base, str(sharded)))
    victim.write_bytes(content)
    index = sharded / "model.safetensors.index.json"
    table = json.loads(index.read_text())
    table["weight_map"]["model.layers.9.mlp.up_proj.weight"] = victim.name
    index.write_text(json.dumps(table))
    assert re.search(r"promises 1 tensors .*layers\.9", extract_refusal(tmp_path, pair.base, str(sharded)))


def test_numbers_that_are_none(trio: Make, tmp_path: Path) -> None:
    pair = trio("llama")

    def spoil(weights: dict[str, torch.Tensor]) -> None:
        weights["model.layers.1.mlp.up_proj.weight"][3, 3] = float("nan")

    spoiled = rewrite(copy(pair.tuned, tmp_path / "t"), spoil)
    assert re.search(r"layers\.1\.mlp\.up_proj\.weight is not finite", extract_refusal(tmp_path, pair.base, spoiled))


def test_folders_that_are_not_models(trio: Make, tmp_path: Path) -> None:
    pair = trio("llama")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert re.search(r"has no model\.safetensors", extract_refusal(tmp_path, pair.base, str(empty)))
    (empty / "pytorch_model.bin").write_bytes(b"")
    assert re.search("pickles", extract_refusal(tmp_path, pair.base, str(empty)))
    assert re.search(
        "is not a folder, and not a hub id", extract_refusal(tmp_path, pair.base, str(tmp_path / "absent/one"))
    )


def test_settings_that_contradict(trio: Make, tmp_path: Path) -> None:
    pair = trio("llama")
    assert re.search("share and size_mb", extract_refusal(tmp_path, pair.base, pair.tuned, share=0.9, size_mb=1.0))
    assert re.search("vLLM refuses", extract_refusal(tmp_path, pair.base, pair.tuned, profile="serving", lm_head=True))
    assert re.search("text=FILE", extract_refusal(tmp_path, pair.base, pair.tuned, verify="loss"))
    assert re.search("rank 1 of every module needs", extract_refusal(tmp_path, pair.base, pair.tuned, size_mb=0.001))


def test_output_exists_and_disk_too_small(trio: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = trio("llama")
    (tmp_path / "out").mkdir()
    assert re.search("exists already", extract_refusal(tmp_path, pair.base, pair.tuned))
    (tmp_path / "out").rmdir()

    class Usage(NamedTuple):
        free: int

    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(1000))
    assert re.search(r"the disk of .* has 0\.0 MB free", extract_refusal(tmp_path, pair.base, pair.tuned))


@pytest.fixture(scope="module")
def adapter(trio: Make, tmp_path_factory: pytest.TempPathFactory) -> str:
    pair, out = trio("llama"), str(tmp_path_factory.mktemp("adapter") / "a")
    extract(ExtractConfig(base=pair.base, tuned=pair.tuned, out=out, rank=4))
    return out


def merge_refusal(tmp_path: Path, target: str, adapter: str, **settings: Any) -> str:
    """What the refusal says; nothing may have appeared in the folder."""
    before = {path.name for path in tmp_path.iterdir()}
    with pytest.raises(UserError) as raised:
        merge(MergeConfig(target=target, adapter=[adapter], out=str(tmp_path / "out"), **settings))
    assert {path.name for path in tmp_path.iterdir()} == before
    return str(raised.value)


def test_adapter_for_fewer_layers(trio: Make, tmp_path: Path, adapter: str) -> None:
    deeper = save(build("llama", num_hidden_layers=3), tmp_path / "deeper", dtype=torch.float32)
    assert re.search(r"missing: model\.layers\.2\.", merge_refusal(tmp_path, deeper, adapter))
    shallow = save(build("llama", num_hidden_layers=1), tmp_path / "shallow", dtype=torch.float32)
    assert re.search(r"unexpected: model\.layers\.1\.", merge_refusal(tmp_path, shallow, adapter))
    wider = save(build("llama", intermediate_size=128), tmp_path / "wider", dtype=torch.float32)
    assert re.search(
        r"of another shape: .*\[96, 64\] for \[128, 64\]", merge_refusal(tmp_path, wider, adapter, allow_partial=True)
    )
    merge(MergeConfig(target=shallow, adapter=[adapter], out=str(tmp_path / "fits"), allow_partial=True))


def test_what_a_partial_merge_leaves_out_is_listed(trio: Make, tmp_path: Path, adapter: str) -> None:
    """Parts that adapter_config.json does not ask for, and those that it asks for and the file lacks."""
    some = edit(copy(adapter, tmp_path / "some"), "adapter_config.json", target_modules=["q_proj"])
    settings = {"target": trio("llama").sibling, "allow_partial": True}
    made = merge(MergeConfig(adapter=[str(some)], out=str(tmp_path / "a"), **settings))
    assert "model.layers.0.mlp.up_proj: adapter_config.json does not ask for it" in made.skipped
    weights = load_file(Path(adapter, "adapter_model.safetensors"))
    kept = {name: tensor for name, tensor in weights.items() if ".layers.1.self_attn.q_proj." not in name}
    save_file(kept, Path(copy(adapter, tmp_path / "lacks"), "adapter_model.safetensors"))
    made = merge(MergeConfig(adapter=[str(tmp_path / "lacks")], out=str(tmp_path / "b"), **settings))
    assert made.skipped == ["model.layers.1.self_attn.q_proj: adapter_config.json asks for it, the file lacks it"]


def test_adapter_for_other_heads(trio: Make, tmp_path: Path, adapter: str) -> None:
    other = edit(copy(trio("llama").sibling, tmp_path / "t"), num_attention_heads=8, num_key_value_heads=4, head_dim=8)
    assert re.search("laid out differently: num_attention_heads 4 / 8", merge_refusal(tmp_path, other, adapter))


def test_adapter_with_half_a_pair(trio: Make, tmp_path: Path, adapter: str) -> None:
    broken = copy(adapter, tmp_path / "broken")
    weights = load_file(broken / "adapter_model.safetensors")
    del weights["base_model.model.lm_head.lora_A.weight"]
    save_file(weights, broken / "adapter_model.safetensors")
    assert re.search(
        "one factor without the other: lm_head", merge_refusal(tmp_path, trio("llama").sibling, str(broken))
    )
    odd = copy(adapter, tmp_path / "odd")
    edit(odd, "adapter_config.json", r=5)
    assert re.search("says rank 5", merge_refusal(tmp_path, trio("llama").sibling, str(odd)))


def test_a_target_that_transformers_reads_as_an_adapter(trio: Make, tmp_path: Path, adapter: str) -> None:
    both = copy(trio("llama").sibling, tmp_path / "both")
    shutil.copy(Path(adapter, "adapter_config.json"), both)
    assert re.search("loads the adapter's base instead", merge_refusal(tmp_path, str(both), adapter))


def test_merge_output_exists(trio: Make, tmp_path: Path, adapter: str) -> None:
    (tmp_path / "out").mkdir()
    assert re.search("exists already", merge_refusal(tmp_path, trio("llama").sibling, adapter))


def test_rope_keep_with_a_theta(trio: Make, tmp_path: Path, adapter: str) -> None:
    assert re.search(
        "leaves rope and window alone",
        merge_refusal(tmp_path, trio("llama").sibling, adapter, rope=MergeRope(rule="keep", theta=1e6)),
    )


def test_failure_while_writing_leaves_nothing(trio: Make, tmp_path: Path, adapter: str) -> None:
    """The sum exceeds fp16's range only when it is written, after many other tensors have been."""

    def huge(weights: dict[str, torch.Tensor]) -> None:
        for name in weights:
            weights[name] = weights[name].half()
        weights["lm_head.weight"][0] = 65504

    target = rewrite(copy(trio("llama").sibling, tmp_path / "t"), huge)
    assert re.search("is not finite after merging", merge_refusal(tmp_path, target, adapter, scale=[1e6]))


@pytest.mark.parametrize("when", [1, 9, 21])
def test_an_interrupt_leaves_nothing(trio: Make, tmp_path: Path, adapter: str, when: int) -> None:
    """Ctrl-C while a tensor is extracted or merged, the last one included."""
    pair = trio("llama")

    def interrupt(done: int, total: int, tensor: str) -> None:
        if done == when:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        extract(ExtractConfig(base=pair.base, tuned=pair.tuned, out=str(tmp_path / "a"), rank=4), interrupt)
    with pytest.raises(KeyboardInterrupt):
        merge(MergeConfig(target=pair.sibling, adapter=[adapter], out=str(tmp_path / "m")), interrupt)
    assert not list(tmp_path.iterdir())


def test_a_refusal_names_the_first_parts_and_counts_the_others():
    """An adapter of a larger base misses hundreds of modules in the target."""
    assert Match(missing=[f"layer{n}" for n in range(9)]).problems == [
        "missing: layer0, layer1, layer2, layer3, layer4, layer5 and 3 more"
    ]
    assert Match(ignored=[], unexpected=["a", "b"]).problems == ["unexpected: a, b"]
