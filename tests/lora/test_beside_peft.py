"""Adapters of every kind beside peft: base + adapter unmerged in PeftModel, and merged by longctx and loaded by
transformers, give the same logits, or the merge is refused with its reason.
"""

from __future__ import annotations

import dataclasses
import json
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

from .conftest import build, change, load, logits, tensors

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


def train(base: str, path: Path, **settings: Any) -> str:
    """An adapter as peft saves it, all that it trains moved a little."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(load(base), LoraConfig(task_type="CAUSAL_LM", **{"r": 4, "lora_alpha": 6, **settings}))
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
        model.save_pretrained(path)
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
    ("untied", {"target_modules": QV, "rank_pattern": {"layers.1.*v_proj": 5}, "alpha_pattern": {"^model.layers.0": 1}}),
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
    ("tied", {"target_modules": ["embed_tokens"], "ensure_weight_tying": True, "rank_pattern": {"lm_head": 8}}),
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
    assert (want - logits(load(target))).abs().max() > 1e-3
    assert torch.allclose(merged(target, adapter, tmp_path / "m"), want, rtol=0, atol=1e-5)
