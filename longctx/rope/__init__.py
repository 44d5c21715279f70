"""Rotary position embeddings as arithmetic: reading a model's rope, extending it by a rule, and bounding its length.

The modules compute with numpy on the dicts that transformers calls `rope_parameters`. longctx.rope.config reads and
writes them in config.json, and longctx.rope.rules has one class per rule. Neither torch nor transformers is imported,
so `longctx theta` and the planner start quickly.
"""

from longctx.rope.bound import (
    PUBLISHED_BOUNDS,
    critical_dimension,
    dims_beyond,
    supported_length,
    wavelengths,
)
from longctx.rope.checks import check_fixed
from longctx.rope.config import Rope, read_rope, rope_of, rope_of_init, rope_of_model
from longctx.rope.frequencies import attention_factor, inv_freq
from longctx.rope.rules import (
    RULES,
    THETA_ONLY,
    AnyRule,
    DynamicNtk,
    ExplicitTheta,
    Rule,
    apply,
    check_theta,
    make_rule,
)

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
    "check_fixed",
    "check_theta",
    "critical_dimension",
    "dims_beyond",
    "inv_freq",
    "make_rule",
    "read_rope",
    "rope_of",
    "rope_of_init",
    "rope_of_model",
    "supported_length",
    "wavelengths",
]
