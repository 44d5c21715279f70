"""theta, plan, train, data stats, eval and the adapter's record begin at the same rope, transformers' own."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from longctx.cli import main
from longctx.config.compose import load as configure
from longctx.config.lora import ExtractConfig, MergeConfig
from longctx.config.model import ModelConfig
from longctx.curriculum import Stage
from longctx.errors import UserError
from longctx.lora.describe import describe
from longctx.lora.extract import extract
from longctx.lora.merge import merge
from longctx.rope import read_rope
from longctx.verbs import VERBS

NUMBERS = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 512, "hidden_size": 64,
    "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 512, "tie_word_embeddings": False,
}  # fmt: skip
PLAIN = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "rope_theta": 1e6}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
# config.json, the rope it means, its window, and the theta that a curriculum of 2,048 and 8,192 ends with
EXAMPLES: dict[str, tuple[dict[str, Any], dict[str, Any], int, int]] = {
    "plain": (PLAIN, {"rope_type": "default", "rope_theta": 1e6}, 512, 351686916),
    "rope_scaling beside a plain rope_parameters": (
        {**PLAIN, "rope_scaling": YARN}, {**YARN, "rope_theta": 1e6}, 2048, 18753317,
    ),
    "type for rope_type": (
        {"rope_parameters": {"type": "linear", "factor": 4.0, "rope_theta": 1e6}},
        {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e6}, 512, 351686916,
    ),
    "original at the top": (
        {"rope_theta": 1e6, "rope_scaling": YARN, "original_max_position_embeddings": 256},
        {**YARN, "original_max_position_embeddings": 256, "rope_theta": 1e6}, 1024, 118005140,
    ),
    "a share that llama ignores": (
        {**PLAIN, "partial_rotary_factor": 0.5, "head_dim": None}, {"rope_type": "default", "rope_theta": 1e6}, 512,
        351686916,
    ),
}  # fmt: skip


def write(folder: Path, rope: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**NUMBERS, **rope}))
    return folder


@pytest.fixture(scope="module")
def configs() -> dict[str, Any]:
    """The composed config of each verb; a test puts its model in."""
    words = ("model.path=somewhere", "curriculum=tiny_16x")
    return {verb: configure(VERBS[verb], words) for verb in ("theta", "plan", "train")}


def stages_of_each_verb(folder: Path, configs: dict[str, Any]) -> dict[str, list[Stage]]:
    from longctx.planner.run import _stages
    from longctx.theta.inputs import starting_rope, target_stages
    from longctx.train.train import resolve_stages

    model = ModelConfig(path=str(folder))
    theta, plan, train = (replace(configs[verb], model=model) for verb in ("theta", "plan", "train"))
    return {
        "theta": target_stages(theta, starting_rope(theta))[0],
        "plan": _stages(plan)[1],
        "train": resolve_stages(train),
    }


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_verb_begins_at_the_rope_that_transformers_reads(tmp_path: Path, configs: dict[str, Any], name: str):
    written, rope, window, theta = EXAMPLES[name]
    folder = write(tmp_path, written)
    for verb, stages in stages_of_each_verb(folder, configs).items():
        assert stages[-1].seq_len == 8192
        assert (dict(stages[-1].rope), stages[-1].theta) == ({**rope, "rope_theta": theta}, theta), verb
    read = read_rope(folder)
    assert (dict(read.parameters), read.window) == (rope, window)


def checkpoint(folder: Path, rope: dict[str, Any], seed: int) -> str:
    """A random model of two layers whose config.json is written word for word."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**{k: v for k, v in NUMBERS.items() if k != "architectures"}))
    torch.manual_seed(seed)
    weights = {name: value + 0.02 * seed * torch.randn_like(value) for name, value in model.state_dict().items()}
    save_file(weights, str(write(folder, rope) / "model.safetensors"), {"format": "pt"})
    return str(folder)


def inv_freq_of(folder: str) -> torch.Tensor:
    return AutoModelForCausalLM.from_pretrained(folder).model.rotary_emb.inv_freq


TUNED = [name for name in EXAMPLES if name not in ("plain", "a share that llama ignores")]
LEFTOVERS: list[dict[str, Any]] = [
    PLAIN,
    {"rope_theta": 1e6, "rope_scaling": {"type": "llama3", "factor": 2.0, "low_freq_factor": 1.0,
     "high_freq_factor": 4.0}, "original_max_position_embeddings": 128, "partial_rotary_factor": 1.0},
]  # fmt: skip


@pytest.mark.parametrize("leftovers", LEFTOVERS, ids=["plain", "leftovers"])
@pytest.mark.parametrize("name", TUNED)
def test_an_adapter_carries_the_rope_of_its_tuned_model(tmp_path: Path, name: str, leftovers: dict[str, Any]):
    written, rope, window, _ = EXAMPLES[name]
    base = checkpoint(tmp_path / "base", PLAIN, 0)
    tuned, sibling = checkpoint(tmp_path / "tuned", written, 1), checkpoint(tmp_path / "sibling", leftovers, 2)
    adapter, merged = str(tmp_path / "adapter"), str(tmp_path / "merged")
    record = extract(ExtractConfig(base=base, tuned=tuned, out=adapter, rank=4)).extension
    assert (record.rope_parameters, record.window) == (rope, window)
    assert (record.base_rope_parameters, record.base_window) == ({"rope_type": "default", "rope_theta": 1e6}, 512)
    known = describe(adapter)
    assert known.window == window
    assert rope["rope_type"] in str(known.rope)
    result = merge(MergeConfig(target=sibling, adapter=[adapter], out=merged))
    assert (result.rope, result.window) == (rope, window)
    assert torch.equal(inv_freq_of(merged), inv_freq_of(tuned))
    assert (dict(read_rope(merged).parameters), read_rope(merged).window) == (rope, window)


def test_a_trained_model_is_exported_with_its_rope_whatever_the_file_said_before(tmp_path: Path):
    from longctx.model import model_of
    from longctx.model.export import export
    from longctx.model.rotary import set_rope

    leftovers = {"rope_theta": 1e6, "rope_scaling": YARN, "original_max_position_embeddings": 256}
    spec = ModelConfig(path=checkpoint(tmp_path / "base", {**leftovers, "partial_rotary_factor": 1.0}, 0))
    for kind, rope in enumerate([{"rope_type": "default", "rope_theta": 5e6}, {**YARN, "rope_theta": 5e6}]):
        model = model_of(spec)
        set_rope(model, rope, 2048)
        trained = model.model.rotary_emb.inv_freq
        out = export(model.named_parameters(), spec, None, tmp_path / str(kind), rope=rope, window=2048)
        assert torch.equal(inv_freq_of(str(out)), trained)
        assert (dict(read_rope(out).parameters), read_rope(out).window) == (rope, 2048)


def test_a_rope_that_transformers_refuses_is_refused_by_every_verb_in_one_paragraph(tmp_path: Path):
    bad = {"rope_theta": 1e6, "rope_scaling": {"type": "linear"}}
    folder = write(tmp_path / "m", bad)
    message = rf"factor is missing: rope_type='linear' needs it; .*\({folder}/config\.json\)"
    with pytest.raises(UserError, match=message):
        read_rope(folder)
    for words in (
        ["theta", f"model.path={folder}", "to=8192"],
        ["plan", f"model.path={folder}", "curriculum=tiny_16x"],
    ):
        assert main(words) == 2
    base, tuned = checkpoint(tmp_path / "base", PLAIN, 0), checkpoint(tmp_path / "tuned", bad, 1)
    with pytest.raises(UserError, match=r"factor is missing: rope_type='linear' needs it; .*tuned"):
        extract(ExtractConfig(base=base, tuned=tuned, out=str(tmp_path / "a")))
