"""The published rules that extend RoPE to longer windows: one frozen dataclass each, with the paper's equation.

s = L / L0 (new window over present window), d = rotary dimension, f_i = theta^(-2i/d), lambda_i = 2 pi / f_i. `to_hf`
takes the rope of the model, or of the previous stage, and returns the `rope_parameters` that transformers reads.
Thetas are truncated to integers, like the published ones. A new rule is a new class here, which `AnyRule` lists.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, get_args

import numpy as np
from pydantic import Field

from longctx.config.base import MOST_THETA, AboveZero, build
from longctx.errors import UserError, nearest
from longctx.rope.config import Rope
from longctx.rope.frequencies import ROPE_TYPES, attention_factor

Parameters = dict[str, Any]
Start = Literal["previous", "original"]
# A factor below 1 would shrink the window.
Factor = Annotated[AboveZero, Field(ge=1)]
_THETA_EXTENDS = frozenset({"default", "linear", "dynamic", "yarn", "llama3"})


@dataclass(frozen=True, kw_only=True)
class Rule(ABC):
    """A rule that extends a rope to a longer window; a config holds an instance, and `name` tells the class."""

    # The config layer refuses another rule's parameters.
    __pydantic_config__: ClassVar[Any] = {"extra": "forbid", "allow_inf_nan": False}
    name: str
    start: Start = "original"  #: where a stage's rule begins: at the `previous` stage's rope, or the `original` model's
    extends: ClassVar[frozenset[str]]  # rope types it can begin from
    ramp: ClassVar[tuple[str, str] | None] = None  # the parameters between which it interpolates, the lower first
    steps: ClassVar[bool] = False  # whether the two may be equal, so that it steps there

    def __post_init__(self) -> None:
        if self.ramp is not None:
            low, high = (getattr(self, name) for name in self.ramp)
            if low is None or high is None:
                return
            if low > high or (low == high and not self.steps):
                rule = "must be at most" if self.steps else "must be below"
                raise ValueError(f"{self.ramp[0]}={low:g} {rule} {self.ramp[1]}={high:g}")

    def check(self, rope: Rope, where: str = "rule") -> None:
        """Raise UserError where the rule's own parameters do not fit the rope. where: the config key of the rule."""
        return

    @abstractmethod
    def to_hf(self, rope: Rope, length: int) -> Parameters:
        """The `rope_parameters` that transformers reads, for a window of `length` tokens."""


def _with_theta(rope: Rope, theta: float) -> Parameters:
    """The rope with another theta; a `dynamic` rope becomes plain, because training needs fixed frequencies."""
    if rope.kind == "dynamic":
        kept = {key: value for key, value in rope.parameters.items() if key != "factor"}
        return {**kept, "rope_type": "default", "rope_theta": theta}
    return {**rope.parameters, "rope_theta": theta}


def _plain(rope: Rope, **changes: Any) -> Parameters:
    kept = {"rope_theta": rope.theta}
    if "partial_rotary_factor" in rope.parameters:
        kept["partial_rotary_factor"] = rope.parameters["partial_rotary_factor"]
    return {"rope_type": changes.pop("rope_type"), **kept, **changes}


@dataclass(frozen=True, kw_only=True)
class Linear(Rule):
    """Position interpolation: f'_i = f_i / s (Chen et al. 2306.15595); factor overrides s."""

    name: Literal["linear"] = "linear"
    extends: ClassVar[frozenset[str]] = frozenset({"default", "linear"})
    factor: Factor | None = None  #: stretch of the window; null: new window over old

    def to_hf(self, rope: Rope, length: int) -> Parameters:
        factor = self.factor or length / rope.window * rope.parameters.get("factor", 1.0)
        return _plain(rope, rope_type="linear", factor=float(factor))


@dataclass(frozen=True, kw_only=True)
class Ntk(Rule):
    """NTK-aware: theta' = theta s^(d/(d-2)), which stretches the slowest pair by exactly s (bloc97, 2023)."""

    name: Literal["ntk"] = "ntk"
    extends: ClassVar[frozenset[str]] = _THETA_EXTENDS

    def to_hf(self, rope: Rope, length: int) -> Parameters:
        scale = length / rope.window
        return _with_theta(rope, int(rope.theta * scale ** (rope.dim / (rope.dim - 2))))


@dataclass(frozen=True, kw_only=True)
class DynamicNtk(Rule):
    """Dynamic NTK from stage to stage: theta' = theta (f s - (f-1))^(d/(d-2)).

    Source: emozilla, 2023, and transformers' `dynamic`. With factor f = 4, applied from stage to stage, it gives
    Gradient AI's published Llama-3 thetas exactly.
    """

    name: Literal["dynamic-ntk"] = "dynamic-ntk"
    start: Start = "previous"  #: `previous`: each stage extends the one before it
    extends: ClassVar[frozenset[str]] = _THETA_EXTENDS
    factor: Factor = 4.0  #: f of the equation

    def to_hf(self, rope: Rope, length: int) -> Parameters:
        stretch = self.factor * length / rope.window - (self.factor - 1)
        return _with_theta(rope, int(rope.theta * stretch ** (rope.dim / (rope.dim - 2))))


@dataclass(frozen=True, kw_only=True)
class ScalingLaw(Rule):
    """The scaling law theta' = theta^(ln(L/2pi) / ln(L0/2pi)), which keeps the critical dimension (2310.05209)."""

    name: Literal["scaling-law"] = "scaling-law"
    extends: ClassVar[frozenset[str]] = _THETA_EXTENDS

    def to_hf(self, rope: Rope, length: int) -> Parameters:
        if length == rope.window:
            return _with_theta(rope, rope.theta)
        if rope.window <= 2 * math.pi:
            raise UserError(f"rule scaling-law begins at a window of 7 tokens, not {rope.window} ({rope.source})")
        power = math.log(length / (2 * math.pi)) / math.log(rope.window / (2 * math.pi))
        if power * math.log(rope.theta) > math.log(MOST_THETA):
            return _with_theta(rope, MOST_THETA)
        return _with_theta(rope, int(rope.theta**power))


def _paper_ramp(rope: Rope, length: int, alpha: float, beta: float, attention: float) -> Parameters:
    """YaRN's ramp (2309.00071): f'_i = (1-g) f_i/s + g f_i with g = clip((L0/lambda_i - alpha)/(beta - alpha), 0, 1).

    transformers' yarn ramps over the dimension's index instead, so these frequencies are written as `longrope` with
    equal short and long factors, which reproduces them exactly.
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


@dataclass(frozen=True, kw_only=True)
class ByParts(Rule):
    """NTK-by-parts: the paper's ramp over rotations, with unscaled cos and sin (YaRN 2309.00071, section 3.2)."""

    name: Literal["by-parts"] = "by-parts"
    extends: ClassVar[frozenset[str]] = frozenset({"default"})
    ramp: ClassVar[tuple[str, str] | None] = ("alpha", "beta")
    alpha: AboveZero = 1.0  #: turns within the window below which a pair is interpolated
    beta: AboveZero = 32.0  #: turns above which it is left alone

    def to_hf(self, rope: Rope, length: int) -> Parameters:
        return _paper_ramp(rope, length, self.alpha, self.beta, 1.0)


@dataclass(frozen=True, kw_only=True)
class YarnPaper(Rule):
    """YaRN as in the paper: by-parts, with cos and sin times 0.1 ln s + 1 (2309.00071)."""

    name: Literal["yarn-paper"] = "yarn-paper"
    extends: ClassVar[frozenset[str]] = frozenset({"default"})
    ramp: ClassVar[tuple[str, str] | None] = ("alpha", "beta")
    alpha: AboveZero = 1.0  #: turns within the window below which a pair is interpolated
    beta: AboveZero = 32.0  #: turns above which it is left alone

    def to_hf(self, rope: Rope, length: int) -> Parameters:
        attention = 0.1 * math.log(max(length / rope.window, 1)) + 1
        return _paper_ramp(rope, length, self.alpha, self.beta, attention)


@dataclass(frozen=True, kw_only=True)
class Yarn(Rule):
    """YaRN as in transformers, vLLM and the authors' code, where the ramp runs over the dimension's index.

    The ramp lies between the floor and the ceiling of i(rot) = d ln(L0/(2 pi rot)) / (2 ln theta) for rot = beta_fast
    and beta_slow. A model that is yarn or llama3 already keeps its original length and gets the factor L / original:
    Llama 3.1, trained at 8,192 tokens before its own extension, gets 128 for 1,048,576 tokens, as in Nemotron UltraLong
    (2504.06214, with alpha = beta_slow = 1 and beta = beta_fast = 4). A yarn model also keeps its own ramp (beta_fast,
    beta_slow, truncate), mscale and mscale_all_dim, and an attention_factor other than that of its own factor.
    """

    name: Literal["yarn"] = "yarn"
    extends: ClassVar[frozenset[str]] = frozenset({"default", "yarn", "llama3"})
    ramp: ClassVar[tuple[str, str] | None] = ("beta_slow", "beta_fast")
    steps: ClassVar[bool] = True  # Kimi K2 has 1 and 1: the floor and the ceiling differ by a pair
    beta_fast: AboveZero | None = None  #: turns above which a pair is left alone; null: a yarn model's own, or 32
    beta_slow: AboveZero | None = None  #: turns below which it is interpolated; null: a yarn model's own, or 1

    def to_hf(self, rope: Rope, length: int) -> Parameters:
        original = rope.parameters.get("original_max_position_embeddings", rope.window)
        own = _own_yarn(rope)
        fast, slow = self.beta_fast or own.pop("beta_fast", 32.0), self.beta_slow or own.pop("beta_slow", 1.0)
        if slow > fast:
            raise UserError(
                f"rule yarn: beta_slow={slow:g} must be at most beta_fast={fast:g}, and one of them is the model's "
                f"own; give both ({rope.source})"
            )
        return _plain(
            rope,
            rope_type="yarn",
            factor=float(length / original),
            original_max_position_embeddings=int(original),
            **{**own, "beta_fast": fast, "beta_slow": slow},
        )


def _own_yarn(rope: Rope) -> Parameters:
    """The numbers of a yarn model that stay when its factor is raised; empty for other models."""
    if rope.kind != "yarn":
        return {}
    given = {
        key: rope.parameters.get(key) for key in ("beta_fast", "beta_slow", "truncate", "mscale", "mscale_all_dim")
    }
    stated = rope.parameters.get("attention_factor")
    derived = attention_factor({**rope.parameters, "attention_factor": None}, window=rope.window)
    if stated is not None and not math.isclose(stated, derived, rel_tol=1e-3):
        given["attention_factor"] = stated
    return {key: value for key, value in given.items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class Llama3(Rule):
    """Llama 3.1's rule, as in transformers.

    Frequencies with lambda < L0/4 stay, those with lambda > L0 are divided by the factor, and those between are
    interpolated with t = (L0/lambda - 1)/3. The published factor is 8, which Llama 3.1 uses for s = 16.
    """

    name: Literal["llama3"] = "llama3"
    extends: ClassVar[frozenset[str]] = frozenset({"default"})
    factor: Factor = 8.0  #: stretch of the slow pairs
    ramp: ClassVar[tuple[str, str] | None] = ("low_freq_factor", "high_freq_factor")
    low_freq_factor: AboveZero = 1.0  #: turns within the window below which a pair is stretched whole
    high_freq_factor: AboveZero = 4.0  #: turns above which it is left alone

    def to_hf(self, rope: Rope, length: int) -> Parameters:
        return _plain(
            rope,
            rope_type="llama3",
            factor=self.factor,
            low_freq_factor=self.low_freq_factor,
            high_freq_factor=self.high_freq_factor,
            original_max_position_embeddings=rope.window,
        )


@dataclass(frozen=True, kw_only=True)
class LongRope(Rule):
    """LongRoPE: lambda'_i = factor_i lambda_i, with cos and sin times sqrt(1 + ln s / ln L0) (2402.13753).

    The d/2 factors come from a search outside longctx. A served model may use other factors, short_factor, for
    sequences within the original window. Training needs one set, so short_factor defaults to long_factor.
    """

    name: Literal["longrope"] = "longrope"
    extends: ClassVar[frozenset[str]] = frozenset({"default"})
    long_factor: list[AboveZero] = dataclasses.field(default_factory=list)  #: stretch of each rotary pair
    short_factor: list[AboveZero] | None = None  #: of sequences within the original window; null: long_factor

    def to_hf(self, rope: Rope, length: int) -> Parameters:
        self.check(rope)  # also where it is called without `apply`
        return _plain(
            rope,
            rope_type="longrope",
            short_factor=self.short_factor or self.long_factor,
            long_factor=self.long_factor,
            factor=float(length / rope.window),
            original_max_position_embeddings=rope.window,
        )

    def check(self, rope: Rope, where: str = "rule") -> None:
        """Raise UserError unless there is a factor for each rotary pair; `where` is the config key of the rule."""
        key = "rule" if where == "rule" else "rope"  # `longctx theta to=` has rule, curricula have rope for all stages
        for name, factors in (("long_factor", self.long_factor), ("short_factor", self.short_factor)):
            if factors is not None and len(factors) != rope.dim // 2:
                raise UserError(
                    f"{where}=longrope: {name} has {len(factors)} numbers, and the rule needs one per rotary pair, "
                    f"{rope.dim // 2} for this model; give them with the rule, '{key}={{name: longrope, {name}: [1.0, "
                    "...]}', from a search outside longctx (the command line or configs/curriculum)"
                )


@dataclass(frozen=True, kw_only=True)
class ExplicitTheta(Rule):
    """A given theta, the "adjusted base frequency" of Xiong et al. (2309.16039); the other parameters stay."""

    name: Literal["theta"] = "theta"
    extends: ClassVar[frozenset[str]] = frozenset(ROPE_TYPES)
    theta: float = 10000

    def to_hf(self, rope: Rope, length: int) -> Parameters:
        return _with_theta(rope, self.theta)


AnyRule = Linear | Ntk | DynamicNtk | ScalingLaw | ByParts | Yarn | YarnPaper | Llama3 | LongRope
RULES: dict[str, type[Rule]] = {rule.name: rule for rule in get_args(AnyRule)}


# Rules that change only theta, so that a theta found under one of them is valid under the others.
THETA_ONLY = frozenset({Ntk.name, DynamicNtk.name, ScalingLaw.name, ExplicitTheta.name})


def make_rule(name: str, values: Mapping[str, Any], where: str = "rule") -> Rule:
    """Make the rule `name` with the user's parameters.

    Raises UserError for an unknown name, a parameter the rule does not have, or a value out of its range.
    """
    if name not in RULES:
        near = nearest(name, RULES)
        hint = f"did you mean {near!r}? " if near else ""
        raise UserError(f"{where}={name!r} is not a rule; {hint}known: {', '.join(RULES)}")
    known = [field.name for field in dataclasses.fields(RULES[name]) if field.name not in ("name", "start")]
    for key, value in values.items():
        if key not in (*known, "start"):
            takes = f"{', '.join(known)}, start" if known else "no parameters but start"
            raise UserError(f"{where}.{key}={value} does not belong to rule {name!r}; it takes {takes}")
    try:
        return build(RULES[name], values, origin=f"rule {name}")
    except UserError as error:
        raise UserError(f"{where}.{error}") from None


def apply(rule: Rule, rope: Rope, length: int, where: str = "rule") -> Parameters:
    """Return rule.to_hf(rope, length), after checking that the rule can extend a rope of this type.

    Raises UserError, which names the rules that can.
    """
    if rope.kind not in rule.extends:
        able = [name for name, other in RULES.items() if rope.kind in other.extends]
        raise UserError(
            f"{where}={rule.name}: rope_type={rope.kind!r} cannot be extended by rule {rule.name!r}; from "
            f"{rope.kind!r} these can: {', '.join([*able, 'an explicit theta'])} ({rope.source})"
        )
    if rope.dim <= 2:
        raise UserError(f"{where}: a rotary dimension of {rope.dim} leaves nothing to stretch ({rope.source})")
    rule.check(rope, where)
    return rule.to_hf(rope, length)


def check_theta(theta: float, where: str, source: str) -> None:
    """Raise UserError for a theta with which transformers cannot compute."""
    if not 1 < theta < MOST_THETA:
        bound = "is not above 1" if theta <= 1 else "is more than the 9.2e18 with which transformers can compute"
        raise UserError(
            f"{where}: theta={theta:.3g} {bound}; give a {'higher' if theta <= 1 else 'lower'} theta, or another rule, "
            f"such as dynamic-ntk ({source})"
        )
