"""Refuses values of a rope section with which transformers cannot compute, each in one paragraph."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, TypeGuard

from longctx.config.base import MOST_THETA
from longctx.errors import UserError
from longctx.rope.frequencies import ROPE_TYPES, rotary_dim
from longctx.shape import DEFAULTS

ORIGINAL = "original_max_position_embeddings"

_REQUIRED = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "longrope": ("short_factor", "long_factor"),
}
# Keys whose numbers transformers uses, by rope_type; other keys are not checked.
_NUMBERS = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "proportional": ("factor",),
    "yarn": ("factor", ORIGINAL, "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"),
    "llama3": ("factor", ORIGINAL, "low_freq_factor", "high_freq_factor"),
    "longrope": ("factor", ORIGINAL, "attention_factor"),
}
_MAY_BE_NULL = {("yarn", "factor"), ("longrope", "factor")}
_MOST = 1e15  # of such a number
_OPTIONAL = ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")


def check_rope(parameters: Mapping[str, Any], head_dim: int, family: str, source: str) -> None:
    """Raise UserError for a value of the rope section with which transformers cannot compute."""
    kind, theta = parameters["rope_type"], parameters.get("rope_theta")
    if not isinstance(kind, str) or kind not in ROPE_TYPES:
        raise UserError(
            f"rope_type={json.dumps(kind) if kind is None else repr(kind)} is not one longctx knows "
            f"({', '.join(ROPE_TYPES)}); this model cannot be extended by a rule ({source})"
        )
    if "rope_theta" not in parameters:
        raise UserError(
            f"rope_theta is missing, and what model_type={family!r} takes without it is not known here; write it "
            f"into the file ({source})"
        )
    if not is_number(theta) or not 1 < theta < MOST_THETA:
        raise UserError(
            f"rope_theta={_shown(theta)} is not a number above 1 and below 2^63; write it as a plain number, such "
            f"as 500000.0 ({source})"
        )
    for key in _REQUIRED.get(kind, ()):
        if key not in parameters:
            raise UserError(f"{key} is missing: rope_type={kind!r} needs it; add it to the rope section ({source})")
    for key in _NUMBERS.get(kind, ()):
        value = parameters.get(key, 1.0)
        if value is None and (key in _OPTIONAL or (kind, key) in _MAY_BE_NULL):
            continue
        if not is_number(value) or not 0 <= value <= _MOST or (value == 0 and key not in _OPTIONAL):
            raise UserError(
                f"{key}={_shown(value)} is not a positive number up to {_MOST:g}, and rope_type={kind!r} computes with "
                f"it; write it as a plain number ({source})"
            )
    _check_share(parameters, head_dim, family, source)
    if kind == "longrope":
        _check_factors(parameters, head_dim, source)


def check_fixed(parameters: Mapping[str, Any], where: str, source: str) -> None:
    """Raise UserError for a rope whose frequencies change with the length of a sequence, which no stage can train.

    where: the stage or the argument that has the rope, for the message.
    """
    kind = parameters.get("rope_type", "default")
    if kind == "dynamic" or (kind == "longrope" and parameters.get("short_factor") != parameters.get("long_factor")):
        remedy = "a theta or a rule" if kind == "dynamic" else "equal factors (short_factor left out)"
        raise UserError(
            f"{where}: rope_type={kind!r} changes inv_freq with the length of the sequence at run time, and a training "
            f"stage needs one fixed set of frequencies; give it {remedy} ({source})"
        )


def _check_share(parameters: Mapping[str, Any], head_dim: int, family: str, source: str) -> None:
    """Refuse a partial rotation in an architecture that rotates whole heads, and an odd number of dimensions."""
    kind, share = parameters["rope_type"], parameters.get("partial_rotary_factor", 1.0)
    if not is_number(share) or not 0 < share <= 1:
        raise UserError(
            f"partial_rotary_factor={_shown(share)} is not a number above 0 and at most 1; it is the share of a "
            f"head that turns ({source})"
        )
    dim = rotary_dim(parameters, head_dim)
    if family in DEFAULTS and kind != "proportional" and dim != head_dim:
        raise UserError(
            f"partial_rotary_factor={share} with rope_type={kind!r}: the attention of {family} turns all {head_dim} "
            f"dimensions of a head, and transformers fails on {dim}; leave partial_rotary_factor out ({source})"
        )
    if dim < (4 if kind == "dynamic" else 2) or (dim == head_dim and dim % 2):
        raise UserError(
            f"{dim} of the head's {head_dim} dimensions turn, and rotary embeddings turn pairs of them; head_dim "
            f"must be even ({source})"
        )


def _check_factors(parameters: Mapping[str, Any], head_dim: int, source: str) -> None:
    pairs = rotary_dim(parameters, head_dim) // 2
    for key in ("short_factor", "long_factor"):
        factors = parameters[key]
        if not isinstance(factors, list) or not all(is_number(item) and item > 0 for item in factors):
            raise UserError(f"{key} is not a list of positive numbers; rope_type='longrope' needs one ({source})")
        if len(factors) != pairs:
            raise UserError(
                f"{key} has {len(factors)} numbers, and rope_type='longrope' needs one per rotary pair, {pairs} for "
                f"this model ({source})"
            )


def _shown(value: Any) -> str:
    """A value as config.json writes it; one that JSON has no form for as Python writes it."""
    return json.dumps(value, default=repr)


def is_number(value: Any) -> TypeGuard[int | float]:
    """Whether a value of config.json is a finite number; true and false are not."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
