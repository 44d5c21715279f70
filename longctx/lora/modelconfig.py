"""config.json as adapters see it: the rope and window a model was made for, read from and written in both
styles.

transformers 5 keeps `rope_parameters`; readers of the older style (vLLM, llama.cpp, transformers 4) need
`rope_theta` and `rope_scaling` at the top. Values are carried word for word, whatever rule they belong to.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_V4_THETA = 10000.0


def text_section(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The language model's part of a multimodal config, or the config itself."""
    inner = config.get("text_config")
    return inner if isinstance(inner, Mapping) else config


def rope_section(config: Mapping[str, Any]) -> tuple[dict[str, Any], int | None]:
    """(rope_parameters in transformers 5's style, window in tokens); several ropes stay a dict of dicts."""
    inner = text_section(config)
    window = inner.get("max_position_embeddings")
    parameters = inner.get("rope_parameters")
    if parameters:
        found = dict(parameters)
        if not _nested(found):
            found.setdefault("rope_theta", inner.get("rope_theta", _V4_THETA))
            found.setdefault("rope_type", "default")
        return found, window
    scaling = {key: value for key, value in (inner.get("rope_scaling") or {}).items() if key != "type"}
    kind = scaling.get("rope_type") or (inner.get("rope_scaling") or {}).get("type") or "default"
    return {**scaling, "rope_type": kind, "rope_theta": inner.get("rope_theta", _V4_THETA)}, window


def with_rope(config: Mapping[str, Any], rope: Mapping[str, Any], window: int) -> dict[str, Any]:
    """A copy of the config that reads `window` tokens with `rope`, in both key styles."""
    changed = dict(config)
    inner = changed
    if isinstance(config.get("text_config"), Mapping):
        inner = changed["text_config"] = dict(config["text_config"])
    inner["rope_parameters"] = dict(rope)
    inner["max_position_embeddings"] = window
    plain = _main(rope)
    inner["rope_theta"] = plain.get("rope_theta", _V4_THETA)
    scaling = {key: value for key, value in plain.items() if key != "rope_theta"}
    if scaling.get("rope_type", "default") == "default":
        inner["rope_scaling"] = None
    else:
        inner["rope_scaling"] = scaling
    return changed


def describe_rope(rope: Mapping[str, Any]) -> str:
    """A few words for tables: `theta 15,296,098`, or `yarn, theta 10,000, factor 4.0`."""
    plain = _main(rope)
    theta = plain.get("rope_theta")
    words = [] if plain.get("rope_type", "default") == "default" else [str(plain["rope_type"])]
    words += [f"theta {theta:,.10g}"] if theta is not None else []
    words += [f"factor {plain['factor']}"] if plain.get("factor") is not None else []
    return ", ".join(words)


def _nested(rope: Mapping[str, Any]) -> bool:
    return bool(rope) and all(isinstance(value, Mapping) or value is None for value in rope.values())


def _main(rope: Mapping[str, Any]) -> Mapping[str, Any]:
    """The rope of full attention, where layers have different ones."""
    if not _nested(rope):
        return rope
    return rope.get("full_attention") or next(value for value in rope.values() if value)
