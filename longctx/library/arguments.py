"""Arguments that several public functions take: a model in any form, a length."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longctx.errors import UserError

if TYPE_CHECKING:
    from longctx.rope import Rope


def rope_from(config_or_path: Any, caller: str) -> Rope:
    """The rope of a folder or hub id, a config.json's content, a transformers configuration, or a model."""
    from longctx.assets import config_folder
    from longctx.rope import read_rope, rope_of

    if isinstance(config_or_path, str | Path):
        return read_rope(config_folder(str(config_or_path)))
    if isinstance(config_or_path, Mapping):
        return rope_of(config_or_path, "the config")
    config = getattr(plain(config_or_path), "config", config_or_path)
    if not hasattr(config, "to_dict"):
        raise UserError(
            f"{caller}: {type(config_or_path).__name__} is not a model; give a folder or hub id, the content of a "
            "config.json, a transformers configuration, or a model"
        )
    return rope_of(config.to_dict(), getattr(config, "name_or_path", "") or "the model's config")


def plain(model: Any) -> Any:
    """The transformers model inside a prepared one; anything else as it is. Imports nothing."""
    return model.model if type(model).__name__ == "LossModel" else model


def length_of(window: int | str, caller: str) -> int:
    from longctx.config.base import LONGEST, parse_length

    try:
        length = parse_length(window)
    except ValueError as error:
        raise UserError(f"{caller}: window={window!r} {error}") from None
    if length < 2:
        raise UserError(f"{caller}: window={length} is too short; a window has at least 2 tokens")
    if length > LONGEST:
        raise UserError(f"{caller}: window={length} is too long; a window has at most {LONGEST:,} tokens")
    return length


def check_model(model: Any, caller: str) -> None:
    """Raise UserError unless longctx can train `model` exactly."""
    from longctx.model.architectures import causal_lm_of, check_config

    inner = causal_lm_of(model)
    if plain(model) is not model:
        raise UserError(f"{caller}: model is prepared already; use it as it is, or give its part `model.model`")
    if not hasattr(inner, "config") or not hasattr(inner, "get_output_embeddings"):
        raise UserError(
            f"{caller}: model is a {type(model).__name__}, not a causal language model of transformers; load one with "
            "AutoModelForCausalLM.from_pretrained"
        )
    check_config(inner.config, getattr(inner.config, "name_or_path", "") or type(inner).__name__)
