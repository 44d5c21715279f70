"""The length that a set of frequencies supports, beyond which RoPE no longer tells near tokens from far ones.

"Base of RoPE bounds context length" (2405.14591) requires B(m) = sum_i cos(m f_i) to be non-negative for all distances
m < L. The smallest theta that satisfies this depends on the search grid, but the first distance at which a given theta
fails does not; `supported_length` computes it. f: inverse frequencies [d/2] in radians per token.
"""

from __future__ import annotations

import math

import numpy as np

from longctx.rope.frequencies import Frequencies

# The smallest thetas in the paper's table, by length. They are shown for comparison only (see the module docstring).
PUBLISHED_BOUNDS = {
    2**10: 4.3e3, 2**11: 1.6e4, 2**12: 2.7e4, 2**13: 8.4e4, 2**14: 3.1e5, 2**15: 6.4e5,
    2**16: 2.1e6, 2**17: 7.8e6, 2**18: 3.6e7, 2**19: 6.4e7, 2**20: 5.1e8,
}  # fmt: skip

_BLOCK = 1024  # distances per product
_ROWS = 512  # products per early exit: 2^19 distances


def supported_length(frequencies: Frequencies, limit: int = 2**20) -> int | None:
    """The first distance m in [0, limit] with sum_i cos(m f_i) < 0 (2405.14591), or None if there is none.

    By cos((a+b)f) = cos af cos bf - sin af sin bf, two small matrix products in float64 cover 2^20 distances.
    """
    f = np.asarray(frequencies, dtype=np.float64)
    inside = np.outer(f, np.arange(_BLOCK))
    cos_in, sin_in = np.cos(inside), np.sin(inside)
    for first in range(0, limit + 1, _ROWS * _BLOCK):
        count = min(_ROWS, (limit - first) // _BLOCK + 1)
        outer = np.outer(first + _BLOCK * np.arange(count), f)
        sums = (np.cos(outer) @ cos_in - np.sin(outer) @ sin_in).ravel()
        negative = np.flatnonzero(sums < 0)
        if negative.size and first + int(negative[0]) <= limit:
            return first + int(negative[0])
    return None


def wavelengths(frequencies: Frequencies) -> Frequencies:
    """Tokens per turn of each rotary pair, 2 pi / f [d/2]; infinite for a pair that does not turn."""
    with np.errstate(divide="ignore"):
        return 2 * math.pi / np.asarray(frequencies, dtype=np.float64)


def dims_beyond(frequencies: Frequencies, window: int) -> int:
    """The number of dimensions (two per rotary pair) that do not complete a turn within `window` tokens."""
    return 2 * int(np.count_nonzero(wavelengths(frequencies) > window))


def critical_dimension(theta: float, window: int, dim: int) -> int:
    """The number of dimensions that complete a turn in the training window: 2 ceil((d/2) log_theta(L0/2pi)).

    Source: Liu et al. 2310.05209; 70 of 128 for Llama-3 (theta 500000, 8192). At least 0 and at most `dim`.
    """
    return max(0, min(dim, 2 * math.ceil(dim / 2 * math.log(window / (2 * math.pi), theta))))
