"""The lines to paste into a config.json, in the style transformers 5 writes and in the one before it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def new_style(rope: Mapping[str, Any], window: int) -> dict[str, Any]:
    """transformers 5: everything in `rope_parameters`."""
    return {"max_position_embeddings": window, "rope_parameters": dict(rope)}


def old_style(rope: Mapping[str, Any], window: int) -> dict[str, Any]:
    """Before transformers 5, and for readers of that style: `rope_theta` beside `rope_scaling`."""
    apart = ("rope_theta", "partial_rotary_factor")
    scaling = {key: value for key, value in rope.items() if key not in apart}
    partial = {key: rope[key] for key in apart[1:] if key in rope}
    plain = rope.get("rope_type", "default") == "default"
    return {
        "max_position_embeddings": window,
        "rope_theta": rope["rope_theta"],
        "rope_scaling": None if plain else scaling,
        **partial,
    }
