"""Inverse frequencies and the cos/sin factor of every rope type in transformers, from its `rope_parameters`.

In float32 the arithmetic follows transformers step by step, and bit for bit with torch's power function
(longctx.model.rotary passes it; this module does not import torch). In float64 it gives the exact values, which the
bounds use.

Shapes: d rotary dimension, frequencies [d/2]. Sources: Su et al. 2104.09864; transformers' modeling_rope_utils for the
names of the keys.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Frequencies = NDArray[np.floating[Any]]
Parameters = Mapping[str, Any]
# base^exponents for exponents [n] of a dtype, in that dtype
Power = Callable[[float, Frequencies], Frequencies]


def rotary_dim(rope: Parameters, head_dim: int) -> int:
    """The number of a head's dimensions that rotate: all of them unless `partial_rotary_factor` says otherwise."""
    if rope.get("rope_type") == "proportional":
        return head_dim
    return int(head_dim * rope.get("partial_rotary_factor", 1.0))


def inv_freq(
    rope: Parameters, head_dim: int, *, window: int, length: int | None = None, dtype: Any = np.float64,
    power: Power | None = None,
) -> Frequencies:  # fmt: skip
    """Inverse frequencies [d/2] in radians per token.

    rope: transformers' rope_parameters (`rope_type`, `rope_theta`, ...). window: max_position_embeddings.
    length: the length of the sequence, which `dynamic` and `longrope` use (None: as when a model is made).
    dtype: float64 for exact values, float32 for transformers' arithmetic. power: the function that computes
    theta^(2i/d) (None: in float64, rounded once; torch's SIMD power in float32 sometimes differs from that in the last
    place). Raises ValueError for an unknown rope_type.
    """
    kind = rope.get("rope_type", "default")
    if kind not in _INV_FREQ:
        raise ValueError(f"rope_type {kind!r} is not one of {', '.join(_INV_FREQ)}")
    return _INV_FREQ[kind](rope, head_dim, window, length, _Numbers(np.dtype(dtype), power or _power))


def attention_factor(rope: Parameters, *, window: int) -> float:
    """The factor of cos and sin: 0.1 ln s + 1 for yarn, sqrt(1 + ln s / ln L0) for longrope, and 1 otherwise.

    Sources: YaRN 2309.00071, LongRoPE 2402.13753; an explicit `attention_factor` wins in both.
    """
    kind = rope.get("rope_type", "default")
    if kind not in ("yarn", "longrope"):
        return 1.0
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    original = rope["original_max_position_embeddings"]
    factor = rope.get("factor") or window / original
    if factor <= 1:
        return 1.0
    if kind == "longrope":
        return math.sqrt(1 + math.log(factor) / math.log(original))
    mscale, mscale_all = rope.get("mscale"), rope.get("mscale_all_dim")
    if mscale and mscale_all:
        return (0.1 * mscale * math.log(factor) + 1) / (0.1 * mscale_all * math.log(factor) + 1)
    return 0.1 * math.log(factor) + 1


def ramp(low: float, high: float, count: int, dtype: Any) -> Frequencies:
    """A ramp over dimension indices 0..count-1: 0 below `low`, 1 above `high`, linear between."""
    if low == high:
        high += 0.001
    return np.clip((np.arange(count, dtype=dtype) - dtype.type(low)) / dtype.type(high - low), 0, 1)


def correction_range(rope: Parameters, dim: int) -> tuple[float, float]:
    """The dimension indices between which transformers' yarn ramps: i(rot) = d ln(L0/(2 pi rot)) / (2 ln theta).

    rot is beta_fast (32) for the first index and beta_slow (1) for the second. The indices are rounded down and up
    unless `truncate` is false, and then clipped to the valid range.
    """
    original, theta = rope["original_max_position_embeddings"], rope["rope_theta"]

    def index(rotations: float) -> float:
        return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = index(rope.get("beta_fast") or 32), index(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    return max(low, 0), min(high, dim - 1)


def _power(base: float, exponents: Frequencies) -> Frequencies:
    """base^exponents, computed in float64 from operands in the exponents' dtype, and rounded once."""
    dtype = exponents.dtype
    return np.power(np.float64(dtype.type(base)), exponents.astype(np.float64)).astype(dtype)


class _Numbers(NamedTuple):
    """The dtype of every intermediate result, and the function that computes powers."""

    dtype: np.dtype[Any]
    power: Power

    def type(self, value: float) -> Any:
        return self.dtype.type(value)

    def wavelengths(self, theta: float, dim: int, span: int | None = None) -> Frequencies:
        """The powers theta^(2i/d) for all i with 2i < span (None: d)."""
        return self.power(theta, np.arange(0, span or dim, 2).astype(self.dtype) / self.type(dim))


def _default(rope: Parameters, head_dim: int, window: int, length: int | None, n: _Numbers) -> Frequencies:
    return 1 / n.wavelengths(rope["rope_theta"], rotary_dim(rope, head_dim))


def _linear(rope: Parameters, head_dim: int, window: int, length: int | None, n: _Numbers) -> Frequencies:
    return _default(rope, head_dim, window, length, n) / n.type(rope["factor"])


def _dynamic(rope: Parameters, head_dim: int, window: int, length: int | None, n: _Numbers) -> Frequencies:
    dim, factor = rotary_dim(rope, head_dim), rope["factor"]
    seen = max(length or window, window)
    theta = rope["rope_theta"] * (factor * seen / window - (factor - 1)) ** (dim / (dim - 2))
    return 1 / n.wavelengths(theta, dim)


def _yarn(rope: Parameters, head_dim: int, window: int, length: int | None, n: _Numbers) -> Frequencies:
    dim = rotary_dim(rope, head_dim)
    factor = rope.get("factor") or window / rope["original_max_position_embeddings"]
    powers = n.wavelengths(rope["rope_theta"], dim)
    kept, stretched = 1 / powers, 1 / (n.type(factor) * powers)
    keep = 1 - ramp(*correction_range(rope, dim), dim // 2, n.dtype)
    return stretched * (1 - keep) + kept * keep


def _longrope(rope: Parameters, head_dim: int, window: int, length: int | None, n: _Numbers) -> Frequencies:
    beyond = length is not None and length > rope["original_max_position_embeddings"]
    factors = np.array(rope["long_factor" if beyond else "short_factor"], dtype=n.dtype)
    return 1 / (factors * n.wavelengths(rope["rope_theta"], rotary_dim(rope, head_dim)))


def _llama3(rope: Parameters, head_dim: int, window: int, length: int | None, n: _Numbers) -> Frequencies:
    plain = _default(rope, head_dim, window, length, n)
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], n.type(rope["factor"])
    original = rope["original_max_position_embeddings"]
    one = n.type(1)  # torch divides a number by a tensor as number * (1 / tensor)
    waves = n.type(2 * math.pi) * (one / plain)
    smooth = (n.type(original) * (one / waves) - n.type(low)) / n.type(high - low)
    blended = (1 - smooth) * plain / factor + smooth * plain
    outer = np.where(waves > original / low, plain / factor, plain)
    return np.where((waves >= original / high) & (waves <= original / low), blended, outer)


def _proportional(rope: Parameters, head_dim: int, window: int, length: int | None, n: _Numbers) -> Frequencies:
    angles = int(rope.get("partial_rotary_factor", 1.0) * head_dim // 2)
    turning = 1 / n.wavelengths(rope["rope_theta"], head_dim, span=2 * angles)
    still = np.zeros(head_dim // 2 - angles, dtype=n.dtype)
    return np.concatenate([turning, still]) / n.type(rope.get("factor", 1.0))


_INV_FREQ: dict[str, Callable[[Parameters, int, int, int | None, _Numbers], Frequencies]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "yarn": _yarn,
    "longrope": _longrope,
    "llama3": _llama3,
    "proportional": _proportional,
}
ROPE_TYPES = tuple(_INV_FREQ)
