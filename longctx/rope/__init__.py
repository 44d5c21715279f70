"""Rotary position embeddings as arithmetic: what a model has, the rules that stretch it, what a theta
supports.

Plain numpy on the dicts transformers calls `rope_parameters`; imports neither torch nor transformers, so that
`longctx theta` answers at once and the planner can use it.
"""

from longctx.rope.bound import (
    PUBLISHED_BOUNDS,
    critical_dimension,
    dims_beyond,
    supported_length,
    wavelengths,
)
from longctx.rope.frequencies import attention_factor, inv_freq
from longctx.rope.rules import RULES, THETA_ONLY, AnyRule, DynamicNtk, ExplicitTheta, Rule, apply, make_rule
from longctx.rope.state import Rope, read_rope, rope_of, rope_of_init

__all__ = [
    "PUBLISHED_BOUNDS",
    "RULES",
    "THETA_ONLY",
    "AnyRule",
    "DynamicNtk",
    "ExplicitTheta",
    "Rope",
    "Rule",
    "apply",
    "attention_factor",
    "critical_dimension",
    "dims_beyond",
    "inv_freq",
    "make_rule",
    "read_rope",
    "rope_of",
    "rope_of_init",
    "supported_length",
    "wavelengths",
]
