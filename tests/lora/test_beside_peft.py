"""Adapters of every kind beside peft: base + adapter unmerged in PeftModel, and merged by longctx and loaded by
transformers, give the same logits, or the merge is refused with its reason.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from longctx.config.lora import MergeConfig, MergeRope
from longctx.errors import UserError
from longctx.lora import peftconfig
from longctx.lora.merge import merge
from longctx.lora.ties import TIED_BY_DEFAULT

from .conftest import build, change, load, logits

KEEP = MergeRope(rule="keep")
SMALL = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16,
}  # fmt: skip
QV = ["q_proj", "v_proj"]
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def _store(path: Path, dtype: torch.dtype, architecture: str, head: str, **settings: Any) -> str:
    """head: `usual`, `twice` (the tied weight under both names), `other` (another one under lm_head), `only`
    (under lm_head alone), `bare` (names without `model.`).
    """
    model = change(build(architecture, **SMALL, **settings), seed=7).to(dtype)
    model.save_pretrained(path)
    weights = load_file(path / "model.safetensors")
    if head in ("twice", "other"):
        weights[HEAD] = weights[EMBED].clone() + (0.1 if head == "other" else 0.0) * torch.randn_like(weights[EMBED])
    elif head == "only":
        weights[HEAD] = weights.pop(EMBED)
    elif head == "bare":
        weights = {name.removeprefix("model."): tensor for name, tensor in weights.items()}
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    return str(path)


BASES: dict[str, dict[str, Any]] = {
    "untied": {"architecture": "llama", "tied": False},
    "fp64": {"architecture": "llama", "tied": False, "dtype": torch.float64},
    "biased": {"architecture": "llama", "tied": False, "attention_bias": True},
    "tied": {"architecture": "llama", "tied": True},
    "gemma": {"architecture": "gemma", "tied": True},
    "twice": {"architecture": "llama", "tied": True, "head": "twice"},
    "other": {"architecture": "llama", "tied": True, "head": "other"},
    "only": {"architecture": "llama", "tied": True, "head": "only"},
    "bare": {"architecture": "llama", "tied": True, "head": "bare"},
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    made: dict[str, str] = {}

    def make(name: str) -> str:
        if name not in made:
            settings = {"dtype": torch.float32, "head": "usual", **BASES[name]}
            made[name] = _store(tmp_path_factory.mktemp("base") / name, **settings)
        return made[name]

    return make


@functools.cache
def plain_logits(model: str) -> torch.Tensor:
    return logits(load(model))


def train(base: str, path: Path, **settings: Any) -> str:
    """An adapter as peft saves it, with every trained tensor changed a little."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(load(base), LoraConfig(task_type="CAUSAL_LM", **{"r": 4, "lora_alpha": 6, **settings}))
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
        model.save_pretrained(str(path))
    return str(path)


def unmerged(target: str, adapter: str) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return logits(PeftModel.from_pretrained(load(target), adapter).eval())


def merged(target: str, adapter: str, out: Path, **settings: Any) -> torch.Tensor:
    merge(MergeConfig(target=target, adapter=[adapter], out=str(out), rope=KEEP, **settings))
    return logits(load(str(out)))


LAYERS = {"target_modules": QV}
EQUAL: list[tuple[str, dict[str, Any]]] = [
    ("untied", LAYERS),
    ("fp64", {"target_modules": ["q_proj", "down_proj"], "r": 7, "lora_alpha": 3}),
    ("untied", {"target_modules": QV, "use_rslora": True}),
    ("untied", {"target_modules": QV, "r": 1, "lora_alpha": 0.5}),
    ("untied", {"target_modules": QV, "lora_dropout": 0.3, "init_lora_weights": False}),
    ("untied", {"target_modules": QV, "rank_pattern": {"layers.1.self_attn.q_proj": 3, "q_proj": 2}}),
    (
        "untied",
        {"target_modules": QV, "rank_pattern": {"layers.1.*v_proj": 5}, "alpha_pattern": {"^model.layers.0": 1}},
    ),
    ("untied", {"target_modules": QV, "alpha_pattern": {"q_proj": 1, "v_proj": 32}, "use_rslora": True}),
    ("untied", {"target_modules": "all-linear"}),
    ("untied", {"target_modules": r".*layers\.[12]\..*(gate|up)_proj"}),
    ("untied", {"target_modules": QV, "layers_to_transform": [0, 2]}),
    ("untied", {"target_modules": QV, "layers_to_transform": 1, "layers_pattern": "layers"}),
    ("untied", {"target_modules": QV, "layers_to_transform": [1], "layers_pattern": ["layers"]}),
    ("untied", {"target_modules": QV, "exclude_modules": r".*layers\.0\..*"}),
    ("untied", {"target_modules": QV, "exclude_modules": ["layers.1.self_attn.v_proj"]}),
    ("untied", {"target_modules": ["model.layers.0.mlp.up_proj", "o_proj"]}),
    ("untied", {"target_modules": QV, "fan_in_fan_out": True}),
    ("untied", {"target_modules": QV, "init_lora_weights": "gaussian"}),
    ("untied", {"target_modules": QV, "init_lora_weights": "orthogonal"}),
    ("untied", {"target_modules": ["embed_tokens", "q_proj"]}),
    ("untied", {"target_modules": ["lm_head"]}),
    ("untied", {"target_modules": ["lm_head", "embed_tokens"], "use_rslora": True}),
    ("untied", {"target_modules": QV, "modules_to_save": ["lm_head"]}),
    ("untied", {"target_modules": QV, "modules_to_save": ["norm"]}),
    ("untied", {"target_modules": QV, "modules_to_save": ["embed_tokens", "lm_head"], "ensure_weight_tying": True}),
    ("untied", {"target_modules": ["q_proj", "up_proj"], "modules_to_save": ["mlp"]}),
    ("untied", {"target_modules": QV, "trainable_token_indices": [1, 5, 60]}),
    ("untied", {"target_modules": QV, "trainable_token_indices": {"lm_head": [2, 3], "embed_tokens": [5]}}),
    ("biased", {"target_modules": QV, "bias": "lora_only"}),
    ("biased", {"target_modules": QV, "bias": "all"}),
    ("biased", {"target_modules": QV, "lora_bias": True}),
    ("biased", {"target_modules": QV, "lora_bias": True, "bias": "lora_only", "use_rslora": True}),
    ("biased", {"target_modules": QV, "bias": "all", "modules_to_save": ["o_proj"]}),
    ("tied", LAYERS),
    ("tied", {"target_modules": ["embed_tokens"]}),
    ("tied", {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True}),
    ("tied", {"target_modules": ["embed_tokens"], "ensure_weight_tying": True, "alpha_pattern": {"lm_head": 1}}),
    ("tied", {"target_modules": ["lm_head", "q_proj"]}),
    ("tied", {"target_modules": ["lm_head"], "ensure_weight_tying": True}),
    ("tied", {"target_modules": r".*(embed_tokens|v_proj)", "ensure_weight_tying": True}),
    ("tied", {"target_modules": r"model\.embed_tokens|.*v_proj", "ensure_weight_tying": True}),
    ("tied", {"target_modules": ["lm_head", "embed_tokens"]}),
    ("tied", {"target_modules": QV, "modules_to_save": ["embed_tokens"]}),
    ("tied", {"target_modules": QV, "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
    ("tied", {"target_modules": QV, "modules_to_save": ["lm_head"]}),
    ("tied", {"target_modules": QV, "modules_to_save": ["lm_head"], "ensure_weight_tying": True}),
    ("tied", {"target_modules": QV, "modules_to_save": ["lm_head", "embed_tokens"]}),
    ("tied", {"target_modules": QV, "trainable_token_indices": [1, 5, 60]}),
    ("tied", {"target_modules": QV, "trainable_token_indices": {"embed_tokens": [5], "lm_head": [5]}}),
    ("tied", {"target_modules": QV, "trainable_token_indices": {"embed_tokens": [5], "lm_head": [2, 3]}}),
    ("tied", {"target_modules": QV, "trainable_token_indices": {"lm_head": [2, 3]}}),
    ("gemma", {"target_modules": ["embed_tokens", "q_proj"]}),
    ("gemma", {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True}),
    ("twice", {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True}),
    ("twice", {"target_modules": ["embed_tokens"]}),
    ("twice", {"target_modules": ["lm_head"]}),
    ("twice", {"target_modules": QV, "modules_to_save": ["embed_tokens"]}),
    ("other", {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True}),
    ("other", {"target_modules": ["embed_tokens"]}),
    ("other", {"target_modules": QV, "modules_to_save": ["lm_head"], "ensure_weight_tying": True}),
    ("other", {"target_modules": QV, "trainable_token_indices": [1, 5, 60]}),
    ("only", {"target_modules": ["embed_tokens", "q_proj"]}),
    ("only", {"target_modules": ["lm_head"], "ensure_weight_tying": True}),
    ("bare", {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True}),
]


def _name(value: object) -> str:
    return value if isinstance(value, str) else ",".join(f"{k}={v}" for k, v in dict(value).items())  # type: ignore[call-overload]


@pytest.mark.parametrize(("base", "settings"), EQUAL, ids=_name)
def test_merged_equals_peft_unmerged(
    bases: Callable[[str], str], tmp_path: Path, base: str, settings: dict[str, Any]
) -> None:
    target = bases(base)
    adapter = train(target, tmp_path / "a", **settings)
    want = unmerged(target, adapter)
    assert (want - plain_logits(target)).abs().max() > 1e-3
    assert torch.allclose(merged(target, adapter, tmp_path / "m"), want, rtol=0, atol=1e-5)


def edit(adapter: str, file: str = "adapter_config.json", **values: Any) -> None:
    path = Path(adapter, file)
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def retype(adapter: str, change_tensors: Callable[[dict[str, torch.Tensor]], None]) -> None:
    weights = load_file(Path(adapter, "adapter_model.safetensors"))
    change_tensors(weights)
    save_file(weights, Path(adapter, "adapter_model.safetensors"))


@pytest.fixture
def plain(bases: Callable[[str], str], tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """(target, adapter of q_proj and v_proj that a test may spoil)."""
    shared = tmp_path_factory.getbasetemp() / "plain-adapter"
    if not shared.exists():
        train(bases("untied"), shared, **LAYERS)
    shutil.copytree(shared, tmp_path / "a")
    return bases("untied"), str(tmp_path / "a")


def refusal(target: str, adapter: str, out: Path, **settings: Any) -> str:
    with pytest.raises(UserError) as raised:
        merge(MergeConfig(target=target, adapter=[adapter], out=str(out), rope=KEEP, **settings))
    assert not out.exists()
    return str(raised.value)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"use_dora": True}, "DoRA.*use_dora"),
        ({"peft_type": "ADALORA"}, "peft_type is ADALORA"),
        ({"init_lora_weights": "pissa_niter_4"}, "initialisation 'pissa_niter_4' changes the base"),
        ({"init_lora_weights": "OLoRA"}, "changes the base"),
        ({"init_lora_weights": "lora_ga"}, "changes the base"),
        ({"init_lora_weights": "tomorrow"}, "'tomorrow' is unknown"),
        ({"layer_replication": [[0, 2], [1, 3]]}, "repeats layers"),
        ({"target_parameters": ["mlp.experts.gate_up_proj"]}, "bare parameters"),
        ({"alora_invocation_tokens": [3, 4]}, "active only after certain tokens"),
        ({"kasa_config": {"beta": 1e-4}}, "KaSA"),
        ({"use_qalora": True}, "QA-LoRA"),
        ({"monteclora_config": {"num_samples": 4}}, "samples its factors"),
        ({"velora_config": {"num_groups": 4}}, "VeLoRA"),
        ({"use_bdlora": {"nblocks": 2}}, "block-diagonal"),
        ({"arrow_config": {"top_k": 2}}, "routes between adapters"),
        ({"megatron_config": {"a": 1}}, "Megatron"),
        ({"use_sparkle": True}, "use_sparkle=True is no setting of LoRA that longctx knows"),
        ({"target_modules": None}, "target_modules is missing"),
        ({"target_modules": "["}, "not a regular expression"),
        ({"target_modules": "all-linear", "layers_to_transform": [0]}, "as a list"),
        ({"r": 0}, "positive whole numbers"),
        ({"lora_alpha": "8"}, "must be numbers"),
        ({"rank_pattern": {"model.layers.1.self_attn.q_proj": 3}}, r"says rank 3 for model\.layers\.1"),
        ({"target_modules": ["q_proj"]}, r"not asked for .* peft ignores them: .*v_proj"),
        ({"target_modules": ["q_proj", "v_proj", "k_proj"]}, r"missing: model\.layers\.0\.self_attn\.k_proj"),
        ({"exclude_modules": ["layers.1.self_attn.q_proj"]}, r"ignores them: model\.layers\.1\.self_attn\.q_proj"),
        ({"layers_to_transform": [1]}, r"ignores them: model\.layers\.0"),
        ({"modules_to_save": ["lm_head"]}, r"missing: lm_head\.weight"),
        ({"trainable_token_indices": [3]}, r"missing: model\.embed_tokens\.token_adapter"),
        ({"lora_bias": True}, r"missing: .*lora_B\.bias"),
    ],
    ids=str,
)
def test_settings_that_are_refused(plain: tuple[str, str], tmp_path: Path, config: dict[str, Any], reason: str) -> None:
    target, adapter = plain
    edit(adapter, **config)
    assert re.search(reason, refusal(target, adapter, tmp_path / "m"))


def _widen(weights: dict[str, torch.Tensor]) -> None:
    for half, shape in (("A", (4, 40)), ("B", (32, 4))):
        weights[f"base_model.model.model.layers.0.self_attn.q_proj.lora_{half}.weight"] = torch.zeros(shape)


TAMPERED: dict[str, tuple[Callable[[dict[str, torch.Tensor]], Any], str]] = {
    "missing": (
        lambda w: [w.pop(name) for name in list(w) if "layers.1.self_attn.q_proj" in name], "missing: .*1.*q_proj"
    ),
    "half": (lambda w: w.pop(next(name for name in w if "lora_B" in name)), "one factor without the other"),
    "elsewhere": (
        lambda w: w.update({f"base_model.model.model.layers.9.q_proj.lora_{h}.weight": torch.ones(4, 4) for h in "AB"}),
        r"unexpected: model\.layers\.9",
    ),
    "no prefix": (lambda w: w.update({"lm_head.weight": torch.ones(96, 32)}), "do not begin with base_model.model."),
    "compiled": (
        lambda w: w.update({"base_model.model._orig_mod.norm.weight": torch.ones(32)}), r"unexpected: _orig_mod\.norm"
    ),
    "wide": (_widen, r"of another shape: .*\[32, 40\] for \[32, 32\]"),
    "bias of nothing": (
        lambda w: w.update({"base_model.model.model.layers.0.self_attn.q_proj.base_layer.bias": torch.ones(32)}),
        r"unexpected: .*q_proj\.bias",
    ),
    "inner of nothing": (
        lambda w: w.update({"base_model.model.lm_head.base_layer.weight": torch.ones(96, 32)}),
        r"ignores them: lm_head\.base_layer\.weight",
    ),
    "below a wrapped layer": (
        lambda w: w.update({"base_model.model.model.layers.0.self_attn.q_proj.weight": torch.ones(32, 32)}),
        r"ignores them: .*q_proj\.weight",
    ),
    "magnitudes": (
        lambda w: w.update({"base_model.model.lm_head.lora_magnitude_vector": torch.ones(32)}), "neither a factor nor"
    ),
    "rows": (
        lambda w: w.update({f"base_model.model.{EMBED[:-7]}.token_adapter.trainable_tokens_delta": torch.ones(1, 32)}),
        r"ignores them: model\.embed_tokens\.token_adapter",
    ),
    "codes": (lambda w: w.update({next(iter(w)): torch.ones(4, 32, dtype=torch.int8)}), "quantized"),
}  # fmt: skip


@pytest.mark.parametrize("kind", TAMPERED)
def test_files_that_do_not_fit_their_config(plain: tuple[str, str], tmp_path: Path, kind: str) -> None:
    target, adapter = plain
    tamper, reason = TAMPERED[kind]
    retype(adapter, tamper)
    assert re.search(reason, refusal(target, adapter, tmp_path / "m"))


@pytest.mark.parametrize("kind", ["missing", "compiled", "inner of nothing", "below a wrapped layer", "rows"])
def test_what_fits_of_a_file_is_what_peft_takes(plain: tuple[str, str], tmp_path: Path, kind: str) -> None:
    target, adapter = plain
    retype(adapter, TAMPERED[kind][0])
    got = merged(target, adapter, tmp_path / "m", allow_partial=True)
    assert torch.allclose(got, unmerged(target, adapter), rtol=0, atol=1e-5)


@pytest.mark.parametrize("config", [{"target_modules": ["q_proj"]}, {"layers_to_transform": [1]}], ids=str)
def test_what_the_config_does_not_name_is_left_out_as_peft_does(
    plain: tuple[str, str], tmp_path: Path, config: dict[str, Any]
) -> None:
    target, adapter = plain
    edit(adapter, **config)
    got = merged(target, adapter, tmp_path / "m", allow_partial=True)
    assert torch.allclose(got, unmerged(target, adapter), rtol=0, atol=1e-5)


def test_factors_with_a_bias_need_a_layer_with_one(bases: Callable[[str], str], tmp_path: Path) -> None:
    adapter = train(bases("untied"), tmp_path / "a", target_modules=QV, lora_bias=True)
    assert "the target's module has no bias to add it to" in refusal(bases("untied"), adapter, tmp_path / "m")


def test_every_setting_of_peft_is_decided() -> None:
    """A newer peft with another setting fails here; then somebody has to find out its meaning."""
    known = {field.name for field in dataclasses.fields(LoraConfig)}
    assert known == peftconfig.HONOURED | peftconfig.NO_EFFECT | set(peftconfig.REFUSED)
    assert not peftconfig.HONOURED & peftconfig.NO_EFFECT


def test_families_that_tie_by_default() -> None:
    from transformers import AutoConfig

    for family in TIED_BY_DEFAULT:
        assert AutoConfig.for_model(family).get_text_config().tie_word_embeddings, family
    for family in ("llama", "mistral", "qwen2", "qwen3", "phi3"):
        assert not AutoConfig.for_model(family).tie_word_embeddings, family
