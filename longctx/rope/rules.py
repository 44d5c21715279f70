"""The published ways to stretch RoPE, one small frozen dataclass each, with the paper's equation.

s = L/L0 (new over present window), d = rotary dimension, f_i = theta^(-2i/d), lambda_i = 2 pi / f_i. `to_hf`
takes what the model (or the stage before) has and gives the `rope_parameters` transformers reads. Thetas are
truncated to integers, as the published ones are.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np

from longctx.errors import UserError, nearest
from longctx.rope.config import Rope
from longctx.rope.frequencies import ROPE_TYPES

Parameters = dict[str, Any]
_THETA_EXTENDS = frozenset({"default", "linear", "dynamic", "yarn", "llama3"})


class Rule(Protocol):
    """A way from one rope to a longer one."""

    name: ClassVar[str]
    start: ClassVar[str]  # whether a chain of stages begins each step at the "previous" stage or the "original"
    extends: ClassVar[frozenset[str]]  # rope types it can begin from

    def to_hf(self, rope: Rope, length: int) -> Parameters: ...


def _with_theta(rope: Rope, theta: float) -> Parameters:
    """The same rope with another theta; `dynamic` becomes plain, since training fixes what it would vary."""
    if rope.kind == "dynamic":
        kept = {key: value for key, value in rope.parameters.items() if key != "factor"}
        return {**kept, "rope_type": "default", "rope_theta": theta}
    return {**rope.parameters, "rope_theta": theta}


def _plain(rope: Rope, **changes: Any) -> Parameters:
    kept = {"rope_theta": rope.theta}
    if "partial_rotary_factor" in rope.parameters:
        kept["partial_rotary_factor"] = rope.parameters["partial_rotary_factor"]
    return {"rope_type": changes.pop("rope_type"), **kept, **changes}


@dataclass(frozen=True)
class Linear:
    """Position interpolation: f'_i = f_i / s (Chen et al. 2306.15595). factor overrides s."""

    name: ClassVar[str] = "linear"
    start: ClassVar[str] = "original"
    extends: ClassVar[frozenset[str]] = frozenset({"default", "linear"})
    factor: float | None = None

    def to_hf(self, rope: Rope, length: int) -> Parameters:
        factor = self.factor or length / rope.window * rope.parameters.get("factor", 1.0)
        return _plain(rope, rope_type="linear", factor=float(factor))


@dataclass(frozen=True)
class Ntk:
    """NTK-aware: theta' = theta s^(d/(d-2)), which stretches the slowest pair by exactly s (bloc97, 2023)."""

    name: ClassVar[str] = "ntk"
    start: ClassVar[str] = "original"
    extends: ClassVar[frozenset[str]] = _THETA_EXTENDS

    def to_hf(self, rope: Rope, length: int) -> Parameters:
        scale = length / rope.window
        return _with_theta(rope, int(rope.theta * scale ** (rope.dim / (rope.dim - 2))))


@dataclass(frozen=True)
class DynamicNtk:
    """Stage-to-stage dynamic NTK: theta' = theta (f s - (f-1))^(d/(d-2)) (emozilla, 2023; transformers
    `dynamic`).

    With factor f = 4, chained from stage to stage, it gives Gradient AI's published Llama-3 thetas to the
    integer.
    """

    name: ClassVar[str] = "dynamic-ntk"
    start: ClassVar[str] = "previous"
    extends: ClassVar[frozenset[str]] = _THETA_EXTENDS
    factor: float = 4.0

    def to_hf(self, rope: Rope, length: int) -> Parameters:
        stretch = self.factor * length / rope.window - (self.factor - 1)
        return _with_theta(rope, int(rope.theta * stretch ** (rope.dim / (rope.dim - 2))))


@dataclass(frozen=True)
class ScalingLaw:
    """theta' = theta^(ln(L/2pi) / ln(L0/2pi)), keeping the critical dimension (Liu et al. 2310.05209)."""

    name: ClassVar[str] = "scaling-law"
    start: ClassVar[str] = "original"
    extends: ClassVar[frozenset[str]] = _THETA_EXTENDS

    def to_hf(self, rope: Rope, length: int) -> Parameters:
        if length == rope.window:
            return _with_theta(rope, rope.theta)
        power = math.log(length / (2 * math.pi)) / math.log(rope.window / (2 * math.pi))
        return _with_theta(rope, int(rope.theta**power))


def _paper_ramp(rope: Rope, length: int, alpha: float, beta: float, attention: float) -> Parameters:
    """f'_i = (1-g) f_i/s + g f_i with g = clip((L0/lambda_i - alpha)/(beta - alpha), 0, 1), YaRN
    2309.00071.

    transformers' own yarn ramps over the dimension's index instead, so these frequencies are written as
    `longrope` with equal short and long factors, which reproduces them as they stand.
    """
    scale = length / rope.window
    frequencies = rope.frequencies()
    keep = np.clip((rope.window * frequencies / (2 * math.pi) - alpha) / (beta - alpha), 0, 1)
    factors = [float(value) for value in 1 / ((1 - keep) / scale + keep)]
    return _plain(
        rope,
        rope_type="longrope",
        short_factor=factors,
        long_factor=factors,
        factor=float(scale),
        original_max_position_embeddings=rope.window,
        attention_factor=attention,
    )


@dataclass(frozen=True)
class ByParts:
    """NTK-by-parts: the paper's ramp over rotations, cos and sin unscaled (YaRN 2309.00071 sec. 3.2)."""

    name: ClassVar[str] = "by-parts"
    start: ClassVar[str] = "original"
    extends: ClassVar[frozenset[str]] = frozenset({"default"})
    alpha: float = 1.0
    beta: float = 32.0

    def to_hf(self, rope: Rope, length: int) -> Parameters:
        return _paper_ramp(rope, length, self.alpha, self.beta, 1.0)


@dataclass(frozen=True)
class YarnPaper:
    """YaRN as the paper writes it: by-parts, and cos and sin times 0.1 ln s + 1 (2309.00071)."""

    name: ClassVar[str] = "yarn-paper"
    start: ClassVar[str] = "original"
    extends: ClassVar[frozenset[str]] = frozenset({"default"})
    alpha: float = 1.0
    beta: float = 32.0

    def to_hf(self, rope: Rope, length: int) -> Parameters:
        attention = 0.1 * math.log(max(length / rope.window, 1)) + 1
        return _paper_ramp(rope, length, self.alpha, self.beta, attention)


@dataclass(frozen=True)
class Yarn:
    """YaRN as transformers, vLLM and the authors' code have it: the ramp runs over the dimension's index.

    Between floor and ceil of i(rot) = d ln(L0/(2 pi rot)) / (2 ln theta), rot = beta_fast, beta_slow. A model
    that is already yarn keeps its original length and gets the factor L / original.
    """

    name: ClassVar[str] = "yarn"
    start: ClassVar[str] = "original"
    extends: ClassVar[frozenset[str]] = frozenset({"default", "yarn"})
    beta_fast: float = 32.0
    beta_slow: float = 1.0

    def to_hf(self, rope: Rope, length: int) -> Parameters:
        original = rope.parameters.get("original_max_position_embeddings", rope.window)
        return _plain(
            rope,
            rope_type="yarn",
            factor=float(length / original),
            original_max_position_embeddings=int(original),
            beta_fast=self.beta_fast,
            beta_slow=self.beta_slow,
        )


@dataclass(frozen=True)
class Llama3:
    """Llama 3.1's: lambda < L0/4 kept, lambda > L0 divided by 8, t = (L0/lambda - 1)/3 between
    (transformers).

    factor 8 is the published one, used there for s = 16.
    """

    name: ClassVar[str] = "llama3"
    start: ClassVar[str] = "original"
    extends: ClassVar[frozenset[str]] = frozenset({"default"})
    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0

    def to_hf(self, rope: Rope, length: int) -> Parameters:
        values = dataclasses.asdict(self)
        return _plain(rope, rope_type="llama3", **values, original_max_position_embeddings=rope.window)


@dataclass(frozen=True)
class LongRope:
    """LongRoPE: lambda'_i = factor_i lambda_i, cos and sin times sqrt(1 + ln s / ln L0) (2402.13753).

    The factors come from a search outside longctx, d/2 of them. Sequences within the window may have their
    own, short_factor, when served; training wants one set, so that left out they are the long ones.
    """

    name: ClassVar[str] = "longrope"
    start: ClassVar[str] = "original"
    extends: ClassVar[frozenset[str]] = frozenset({"default"})
    long_factor: list[float] = dataclasses.field(default_factory=list)
    short_factor: list[float] | None = None

    def to_hf(self, rope: Rope, length: int) -> Parameters:
        short = self.short_factor or self.long_factor
        for name, factors in (("long_factor", self.long_factor), ("short_factor", short)):
            if len(factors) != rope.dim // 2:
                raise UserError(
                    f"{name} has {len(factors)} numbers, but longrope needs one per rotary pair, "
                    f"{rope.dim // 2} for this model ({rope.source})"
                )
        return _plain(
            rope,
            rope_type="longrope",
            short_factor=short,
            long_factor=self.long_factor,
            factor=float(length / rope.window),
            original_max_position_embeddings=rope.window,
        )


@dataclass(frozen=True)
class ExplicitTheta:
    """A theta chosen outright, "adjusted base frequency" (Xiong et al. 2309.16039); the rest is kept."""

    name: ClassVar[str] = "theta"
    start: ClassVar[str] = "original"
    extends: ClassVar[frozenset[str]] = frozenset(ROPE_TYPES)
    theta: float = 10000

    def to_hf(self, rope: Rope, length: int) -> Parameters:
        return _with_theta(rope, self.theta)


RULES: dict[str, type[Rule]] = {
    rule.name: rule for rule in (Linear, Ntk, DynamicNtk, ScalingLaw, ByParts, Yarn, YarnPaper, Llama3, LongRope)
}


# Rules that change theta and nothing else: a theta means the same under each of them.
THETA_ONLY = frozenset({Ntk.name, DynamicNtk.name, ScalingLaw.name, ExplicitTheta.name})


def make_rule(name: str, values: Mapping[str, Any], where: str = "rule") -> Rule:
    """The rule `name` with the parameters the user gave.

    Raises UserError for an unknown name, a parameter the rule does not have, or a factor below 1.
    """
    if name not in RULES:
        near = nearest(name, RULES)
        hint = f"did you mean {near!r}? " if near else ""
        raise UserError(f"{where}={name!r} is not a rule; {hint}known: {', '.join(RULES)}")
    known = [field.name for field in dataclasses.fields(RULES[name])]  # type: ignore[arg-type]
    for key, value in values.items():
        if key not in known:
            has = f"it takes {', '.join(known)}" if known else "it takes no parameters"
            raise UserError(f"{where}.{key}={value} does not belong to rule {name!r}; {has}")
        if key == "factor" and value is not None and value < 1:
            raise UserError(f"{where}.factor={value} is below 1, which would shrink the window; give 1 or more")
    return RULES[name](**values)


def apply(rule: Rule, rope: Rope, length: int, where: str = "rule") -> Parameters:
    """rule.to_hf(rope, length), after asking whether the rule can start from this rope_type.

    Raises UserError that names the rules that can.
    """
    if rope.kind not in rule.extends:
        able = [name for name, other in RULES.items() if rope.kind in other.extends]
        raise UserError(
            f"{where}={rule.name}: rope_type={rope.kind!r} cannot be extended by rule {rule.name!r}; "
            f"from {rope.kind!r} these can: {', '.join([*able, 'an explicit theta'])} ({rope.source})"
        )
    if rope.dim <= 2:
        raise UserError(f"{where}: a rotary dimension of {rope.dim} leaves nothing to stretch ({rope.source})")
    return rule.to_hf(rope, length)
