"""Classifies the tensors of a model for a LoRA, and checks that two models are a base and its training.

Names, shapes and config.json decide; no model is built. Names follow PEFT: `model.layers.0.mlp.up_proj.weight` belongs
to module `model.layers.0.mlp.up_proj`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from longctx.errors import UserError
from longctx.lora.tensors import StoredTensors
from longctx.rope.config import describe_rope, rope_to_carry
from longctx.shape import head_dim_of, kv_heads_of, text_section
from longctx.storage.model import check_shapes
from longctx.storage.model_files import Source
from longctx.storage.table import Entry

# The usual names of input embeddings and output layers; all other two-dimensional weights are linear layers.
_EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings")
_HEADS = ("lm_head", "embed_out", "output")
# Architectures that store their linear layers transposed (Conv1D), so a LoRA of a torch Linear does not fit them.
_TRANSPOSED = {"gpt2", "openai-gpt", "imagegpt", "decision_transformer"}
# Keys of config.json on which two models must agree before they are subtracted or merged.
_IDENTITY = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
_IDENTITY += (
    "head_dim",
    "intermediate_size",
    "vocab_size",
    "num_local_experts",
    "num_experts",
)


class WeightKind(Enum):
    """The kind of a weight, on which depends how a LoRA can carry it."""

    LINEAR = "linear"
    HEAD = "lm_head"
    EMBEDDING = "embedding"
    VECTOR = "norm or bias"
    OTHER = "other"


@dataclass(frozen=True)
class Module:
    """One tensor and its kind; `name` is PEFT's name of its module."""

    entry: Entry
    kind: WeightKind

    @property
    def name(self) -> str:
        return self.entry.name.removesuffix(".weight")


def leaf_of(tensor: str) -> str:
    """The last part of a module's name, by which PEFT selects modules: up_proj of model.layers.0.mlp.up_proj.weight."""
    return tensor.removesuffix(".weight").rsplit(".", 1)[-1]


def classify(entry: Entry) -> WeightKind:
    """The kind of a tensor, from its name and shape."""
    leaf = leaf_of(entry.name)
    if len(entry.shape) == 1:
        return WeightKind.VECTOR
    if len(entry.shape) != 2 or not entry.name.endswith(".weight"):
        return WeightKind.OTHER
    if leaf in _EMBEDDINGS:
        return WeightKind.EMBEDDING
    return WeightKind.HEAD if leaf in _HEADS else WeightKind.LINEAR


def modules_of(tensors: StoredTensors) -> list[Module]:
    return [Module(entry, classify(entry)) for entry in tensors.entries.values()]


def layout(config: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a config.json on which models must agree, with the head numbers filled in as in transformers."""
    inner = {**config, **text_section(config)}
    values = {key: inner[key] for key in _IDENTITY if inner.get(key) is not None}
    if "num_attention_heads" in values:
        values["head_dim"] = head_dim_of(config, "config.json")
        values["num_key_value_heads"] = kv_heads_of(config, "config.json")
    return values


def carried_rope(tensors: StoredTensors) -> tuple[dict[str, Any], int | None]:
    """The rope_parameters and the window of a model, as an adapter records them."""
    return rope_to_carry(tensors.config(), f"{tensors.what}={tensors.path}, config.json")


def check_pair(base: StoredTensors, tuned: StoredTensors, *, allow_shorter: bool) -> None:
    """Raise UserError unless `tuned` can be the result of training `base`."""
    first, second = base.config(), tuned.config()
    ours, theirs = layout(first), layout(second)
    differing = [f"{key} {ours.get(key)} / {theirs.get(key)}" for key in _IDENTITY if ours.get(key) != theirs.get(key)]
    if differing:
        raise UserError(
            f"base={base.path} and tuned={tuned.path} are not one architecture: {', '.join(differing)} (base / tuned, "
            "config.json); a difference exists only between a model and its own training"
        )
    _check_tensors(base, tuned)
    check_shapes(base, first)
    check_shapes(tuned, second)
    _check_tokenizers(base, tuned)
    if not allow_shorter:
        _check_direction(base, tuned)


def check_weights(tensors: StoredTensors) -> None:
    """Refuse quantized weights, transposed linear layers, and folders that transformers reads as an adapter."""
    config = tensors.config()
    if tensors.source.exists("adapter_config.json"):
        raise UserError(
            f"{tensors.what}={tensors.path} holds an adapter_config.json beside a model, and transformers then "
            "loads the adapter's base instead of these weights; move the adapter's files to a folder of their own"
        )
    quantized = config.get("quantization_config") or text_section(config).get("quantization_config")
    if quantized:
        method = quantized.get("quant_method", "unknown method") if isinstance(quantized, Mapping) else quantized
        raise UserError(
            f"{tensors.what}={tensors.path} is quantized ({method}, quantization_config in config.json); its "
            "numbers are codes and cannot be subtracted or added; give the model in bf16, fp16 or fp32"
        )
    tensors.require_floats()
    if config.get("model_type") in _TRANSPOSED:
        raise UserError(
            f"{tensors.what}={tensors.path}: {config['model_type']} stores its linears transposed, which "
            "longctx does not support; rotary models (llama, mistral, qwen, gemma, phi3, ...) are"
        )


def _check_tensors(base: StoredTensors, tuned: StoredTensors) -> None:
    only_base = [name for name in base.entries if name not in tuned.entries]
    only_tuned = [name for name in tuned.entries if name not in base.entries]
    shapes = [
        f"{name} {list(entry.shape)} / {list(tuned.entries[name].shape)}"
        for name, entry in base.entries.items()
        if name in tuned.entries and tuned.entries[name].shape != entry.shape
    ]
    parts = [
        f"{title}: {', '.join(names[:5])}{' ...' if len(names) > 5 else ''} ({len(names)})"
        for title, names in (
            ("only in base", only_base),
            ("only in tuned", only_tuned),
            ("of other shape", shapes),
        )
        if names
    ]
    if parts:
        raise UserError(
            f"base={base.path} and tuned={tuned.path} do not hold the same tensors; {'; '.join(parts)}. Use the exact "
            "model the training started from"
        )


def _check_tokenizers(base: StoredTensors, tuned: StoredTensors) -> None:
    differing = differing_vocabulary(base.source, tuned.source)
    if differing is not None:
        raise UserError(
            f"base={base.path} and tuned={tuned.path} have different vocabularies ({': '.join(filter(None, differing))}"
            "): the rows of their embeddings mean different tokens; extract from the model with the same tokenizer"
        )


def differing_vocabulary(base: Source, tuned: Source) -> tuple[str, str] | None:
    """The first tokenizer file that gives two models different tokens or ids, and these tokens; None where none does.

    The tokens are in words, with their ids in base and in tuned; empty where the file is not JSON.
    """
    for file in ("tokenizer.json", "tokenizer.model", "vocab.json"):
        if not (base.exists(file) and tuned.exists(file)):
            continue
        first, second = base.fetch(file).read_bytes(), tuned.fetch(file).read_bytes()
        if first == second:
            continue
        if file == "tokenizer.model":
            return file, ""
        ours, theirs = _vocabulary(first), _vocabulary(second)
        if differing := [token for token in {**ours, **theirs} if ours.get(token) != theirs.get(token)]:
            words = [f"{token!r} {ours.get(token, 'none')} / {theirs.get(token, 'none')}" for token in differing[:3]]
            more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
            return file, f"token {', '.join(words)}{more}"
    return None


def _vocabulary(content: bytes) -> dict[str, Any]:
    """The id of every token of a tokenizer.json or vocab.json; fields that change when it is saved again are left out.

    A token may stand among the model's or among the added ones: saving moves it, and its row stays.
    """
    table = json.loads(content)
    model = table.get("model", {}) if isinstance(table, dict) else {}
    if not isinstance(model, dict) or "vocab" not in model:
        return table if isinstance(table, dict) else {"": table}
    vocabulary = model["vocab"]
    if isinstance(vocabulary, list):  # Unigram's pieces, each with its score
        vocabulary = {piece: index for index, (piece, _) in enumerate(vocabulary)}
    return {**vocabulary, **{item["content"]: item["id"] for item in table.get("added_tokens", [])}}


def _check_direction(base: StoredTensors, tuned: StoredTensors) -> None:
    (rope_base, window_base), (rope_tuned, window_tuned) = carried_rope(base), carried_rope(tuned)
    theta_base, theta_tuned = rope_base.get("rope_theta") or 0, rope_tuned.get("rope_theta") or 0
    shorter = (window_base or 0) > (window_tuned or 0) > 0
    smaller = window_base == window_tuned and theta_base > theta_tuned
    if shorter or smaller:
        raise UserError(
            f"base and tuned look swapped: base={base.path} reads {window_base} tokens ({describe_rope(rope_base)}) "
            f"and tuned={tuned.path} reads {window_tuned} ({describe_rope(rope_tuned)}), and the longer one is the "
            "tuned one; exchange them, or say allow_shorter=true if training really shortened the window"
        )
