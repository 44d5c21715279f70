"""Rotary position embeddings as arithmetic: what a model has, the rules that stretch it, what a theta
supports.

Plain numpy on the dicts that transformers calls `rope_parameters`; config.json's are read and written in
longctx.rope.config. Imports neither torch nor transformers, so that
`longctx theta` answers at once and the planner can use it.
"""

from longctx.rope.bound import (
    PUBLISHED_BOUNDS,
    critical_dimension,
    dims_beyond,
    supported_length,
    wavelengths,
)
from longctx.rope.config import Rope, read_rope, rope_of, rope_of_init, rope_of_model
from longctx.rope.frequencies import attention_factor, inv_freq
from longctx.rope.rules import RULES, THETA_ONLY, AnyRule, DynamicNtk, ExplicitTheta, Rule, apply, make_rule

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
    "rope_of_model",
    "supported_length",
    "wavelengths",
]
