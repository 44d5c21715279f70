"""Extraction: the difference is kept as well as its rank allows, the files are PEFT's, and the same seed
gives the same bytes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from longctx.config.lora import ExtractConfig, MergeConfig
from longctx.lora.extract import extract
from longctx.lora.merge import merge

from .conftest import ARCHITECTURES, ROPE, WINDOW, Trio, load, logits, save, tensors

Make = Callable[..., Trio]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_full_rank_and_merge_reproduce_tuned(trio: Make, tmp_path: Path, architecture: str, tied: bool) -> None:
    pair = trio(architecture, tied=tied, dtype=torch.bfloat16)
    out, merged = str(tmp_path / "adapter"), str(tmp_path / "merged")
    extract(ExtractConfig(base=pair.base, tuned=pair.tuned, out=out, rank=10_000, embeddings=True, dtype="float32"))
    merge(MergeConfig(target=pair.base, adapter=[out], out=merged))
    want, got = tensors(pair.tuned), tensors(merged)
    assert want.keys() == got.keys()
    for name, tensor in want.items():
        # One unit in the last place of bf16, besides the fp32 sum's own rounding.
        allowed = tensor.float().abs() * 2**-7 + 1e-6
        assert bool(((got[name].float() - tensor.float()).abs() <= allowed).all()), name
    config = json.loads(Path(merged, "config.json").read_text())
    assert (config["rope_parameters"], config["max_position_embeddings"]) == (ROPE, WINDOW)
    assert config["rope_theta"] == ROPE["rope_theta"]
    assert config["rope_scaling"] is None
    assert torch.allclose(logits(load(merged)), logits(load(pair.tuned)), atol=0.05)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_peft_reads_the_adapter_unchanged(trio: Make, tmp_path: Path, architecture: str) -> None:
    """A rank-4 difference without norms: peft's base + adapter is the tuned model but for norms and
    embeddings.
    """
    pair = trio(architecture, rank=4)
    out = str(tmp_path / "adapter")
    result = extract(
        ExtractConfig(base=pair.base, tuned=pair.tuned, out=out, rank=4, dtype="float32", embeddings=False)
    )
    assert result.share["factors"] > 0.9999
    model = PeftModel.from_pretrained(load(pair.base), out).merge_and_unload()
    want = tensors(pair.tuned)
    got = {name: tensor for name, tensor in model.state_dict().items() if name in want}
    carried = [row.tensor for row in result.rows if row.carried == "factors"]
    assert len(carried) == 14 + (architecture != "gemma")
    for name in carried:
        assert torch.allclose(got[name], want[name], atol=1e-5), name


def test_residual_is_near_the_optimum_for_a_flat_spectrum(trio: Make, tmp_path: Path) -> None:
    """Noise has no strong directions, which is the hardest spectrum for a sketch."""
    pair = trio("llama")
    result = extract(ExtractConfig(base=pair.base, tuned=pair.tuned, out=str(tmp_path / "a"), rank=4, dtype="float32"))
    base, tuned = tensors(pair.base), tensors(pair.tuned)
    for row in result.rows:
        if row.carried == "factors":
            values = torch.linalg.svdvals((tuned[row.tensor] - base[row.tensor]).double())
            best = float((values[4:].square().sum() / values.square().sum()).sqrt())
            assert row.residual <= 1.005 * best
            assert row.residual >= best * (1 - 1e-5)


def test_same_seed_same_bytes_whatever_the_workers(trio: Make, tmp_path: Path) -> None:
    pair = trio("llama")
    for name, workers in (("a", 1), ("b", 3)):
        extract(
            ExtractConfig(
                base=pair.base,
                tuned=pair.tuned,
                out=str(tmp_path / name),
                rank=4,
                workers=workers,
                memory_mib=1,
            )
        )
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert "norm_deltas.safetensors" in names
    for name in names:
        first, second = ((tmp_path / folder / name).read_bytes() for folder in "ab")
        if name != "README.md":
            assert first == second, name


def test_a_worker_has_one_thread_from_its_first_product_on() -> None:
    """A new thread starts with OMP_NUM_THREADS threads, whatever torch.set_num_threads set in another thread."""
    code = (
        "import ctypes, torch; from longctx.threads import one_thread_each\n"
        "maps = open('/proc/self/maps').read().split(); openmp = next(word for word in maps if '/libgomp' in word)\n"
        "with one_thread_each(1) as pool: print(pool.submit(ctypes.CDLL(openmp).omp_get_max_threads).result())"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "3"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "1\n"


def test_differences_too_large_to_keep_are_read_again(trio: Make, tmp_path: Path) -> None:
    """Without memory to keep any difference the result is the same."""
    pair = trio("llama")
    kept = ExtractConfig(base=pair.base, tuned=pair.tuned, out=str(tmp_path / "kept"), rank=4, oversample=4)
    extract(kept)
    import dataclasses

    import longctx.lora.extract as module

    job = module._Extraction

    class Cramped(job):  # type: ignore[misc, valid-type]
        def __init__(self, *arguments: object) -> None:
            super().__init__(*arguments)  # type: ignore[arg-type]
            self.budget = 0

    module._Extraction = Cramped
    try:
        extract(dataclasses.replace(kept, out=str(tmp_path / "read")))
    finally:
        module._Extraction = job
    for file in ("adapter_model.safetensors", "longctx.json"):
        assert (tmp_path / "kept" / file).read_bytes() == (tmp_path / "read" / file).read_bytes()


def test_serving_carries_layers_only_and_lists_the_rest(trio: Make, tmp_path: Path) -> None:
    pair = trio("qwen2", tied=False)
    out = tmp_path / "a"
    result = extract(ExtractConfig(base=pair.base, tuned=pair.tuned, out=str(out), rank=4, profile="serving"))
    config = json.loads((out / "adapter_config.json").read_text())
    assert "lm_head" not in config["target_modules"]
    assert not (out / "norm_deltas.safetensors").exists()
    lost = {row.tensor for row in result.not_carried}
    assert {
        "lm_head.weight",
        "model.embed_tokens.weight",
        "model.norm.weight",
        "model.layers.0.self_attn.q_proj.bias",
    } <= lost
    assert "model.layers.0.self_attn.q_proj.bias" in (out / "README.md").read_text()


def test_share_and_size_choose_ranks(trio: Make, tmp_path: Path) -> None:
    pair = trio("llama", rank=4)
    by_share = extract(ExtractConfig(base=pair.base, tuned=pair.tuned, out=str(tmp_path / "share"), share=0.999))
    ranks = {row.rank for row in by_share.rows if row.carried == "factors"}
    assert ranks <= {3, 4, 5}
    whole = extract(ExtractConfig(base=pair.base, tuned=pair.tuned, out=str(tmp_path / "whole"), rank=4)).bytes
    size = extract(
        ExtractConfig(base=pair.base, tuned=pair.tuned, out=str(tmp_path / "size"), size_mb=0.7 * whole / 1e6)
    )
    assert size.bytes <= 0.7 * whole
    # A rank of every module fewer, spent where it matters, keeps more than a lower rank for all.
    assert size.bytes > 0.5 * whole
    assert {row.rank for row in size.rows if row.carried == "factors"} <= {1, 2, 3, 4}
    for folder in ("share", "size"):
        model = PeftModel.from_pretrained(load(pair.base), str(tmp_path / folder))
        assert torch.isfinite(logits(model)).all()


def test_rslora_scale_is_undone(trio: Make, tmp_path: Path) -> None:
    pair = trio("llama", rank=4)
    out = str(tmp_path / "a")
    extract(ExtractConfig(base=pair.base, tuned=pair.tuned, out=out, rank=4, rslora=True, dtype="float32"))
    model = PeftModel.from_pretrained(load(pair.base), out).merge_and_unload()
    want = tensors(pair.tuned)["lm_head.weight"]
    assert torch.allclose(model.state_dict()["lm_head.weight"], want, atol=1e-5)


def test_large_adapters_are_sharded(trio: Make, tmp_path: Path) -> None:
    pair = trio("llama")
    one, many = str(tmp_path / "one"), str(tmp_path / "many")
    extract(ExtractConfig(base=pair.base, tuned=pair.tuned, out=one, rank=8))
    extract(ExtractConfig(base=pair.base, tuned=pair.tuned, out=many, rank=8, max_shard_mb=0.01))
    assert len(list(Path(many).glob("adapter_model-*.safetensors"))) > 2
    merge(MergeConfig(target=pair.sibling, adapter=[one], out=str(tmp_path / "m1")))
    merge(MergeConfig(target=pair.sibling, adapter=[many], out=str(tmp_path / "m2")))
    assert (tmp_path / "m1/model.safetensors").read_bytes() == (tmp_path / "m2/model.safetensors").read_bytes()


def test_unchanged_modules_cost_nothing(trio: Make, tmp_path: Path) -> None:
    """A layer that training froze gets a zero of rank 1, and a projection frozen everywhere is not named at
    all.
    """
    from safetensors.torch import save_file

    pair = trio("llama", rank=4)
    tuned = tmp_path / "tuned"
    tuned.mkdir()
    weights, base = tensors(pair.tuned), tensors(pair.base)
    for name in weights:
        if "mlp" in name or "layers.1.self_attn.q_proj" in name:
            weights[name] = base[name]
    save_file(weights, tuned / "model.safetensors", metadata={"format": "pt"})
    (tuned / "config.json").write_text(Path(pair.tuned, "config.json").read_text())
    out = tmp_path / "a"
    extract(ExtractConfig(base=pair.base, tuned=str(tuned), out=str(out), rank=4, dtype="float32"))
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["target_modules"] == ["k_proj", "lm_head", "o_proj", "q_proj", "v_proj"]
    assert config["rank_pattern"] == {"model.layers.1.self_attn.q_proj": 1}
    model = PeftModel.from_pretrained(load(pair.base), str(out)).merge_and_unload()
    for name, tensor in model.state_dict().items():
        if "proj" in name:
            assert torch.allclose(tensor, weights[name], atol=1e-5), name


def test_a_base_that_training_rounded_gives_no_change_by_rounding(trio: Make, tmp_path: Path) -> None:
    """A float16 base is trained in bfloat16; only what moved from there is a change, norms included."""
    base = load(trio("llama").base).half()
    save(base, tmp_path / "base", dtype=torch.float16)
    tuned = base.bfloat16()
    with torch.no_grad():
        tuned.model.layers[0].self_attn.q_proj.weight.add_(0.25)
    save(tuned, tmp_path / "tuned", dtype=torch.bfloat16)
    changed = {}
    for kind in ("stored", "bfloat16"):
        config = ExtractConfig(
            base=str(tmp_path / "base"), tuned=str(tmp_path / "tuned"), out=str(tmp_path / kind), rank=4,
            base_dtype=kind, allow_shorter=True,
        )  # fmt: skip
        changed[kind] = [row.tensor for row in extract(config).rows if row.norm > 0]
    assert changed["bfloat16"] == ["model.layers.0.self_attn.q_proj.weight"]
    assert len(changed["stored"]) > 10
