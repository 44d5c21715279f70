"""The best rank-r approximation of a matrix seen only through row blocks: randomized subspace iteration.

Halko, Martinsson & Tropp 2011 (0909.4061), algorithm 4.4: from a random Q [n, l] the bases of the rows and
of the columns are multiplied and orthonormalized in turns. Departures: the first two products share one
pass over the blocks, either side may finish, whether to go on is decided by what the last half step gained,
at no extra pass, and where the gain has not died out after `power_max` steps the exact SVD is taken.

X [m, n] the matrix (m rows in blocks)   r rank kept   l = r + oversample columns of the sketch
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import isfinite
from typing import Protocol

import torch
from torch import Tensor


class BlockMatrix(Protocol):
    """X, as its row blocks in order; blocks() may be called many times."""

    shape: tuple[int, int]
    dtype: torch.dtype
    device: torch.device

    def blocks(self) -> Iterator[tuple[int, Tensor]]: ...
    def dense(self) -> Tensor | None:
        """X whole, where memory allows it."""
        ...


@dataclass(frozen=True)
class Sketch:
    """How hard to try. tolerance: squared norm still to be gained (an estimate) over the squared residual."""

    oversample: int = 16
    power_max: int = 8
    tolerance: float = 4e-3
    seed: int = 0


@dataclass(frozen=True)
class Factors:
    """X ~ left @ diag(values) @ right.T; left [m, k], values [k] descending, right [n, k]; total = ||X||_F^2.

    method: `exact`, or the number of half steps. converged: the error check passed.
    """

    left: Tensor
    values: Tensor
    right: Tensor
    total: float
    method: str
    converged: bool = True


def decompose(matrix: BlockMatrix, rank: int, sketch: Sketch) -> Factors:
    """Rank-`rank` factors of the matrix (fewer when it has fewer rows or columns)."""
    m, n = matrix.shape
    rank = min(rank, m, n)
    columns = min(rank + sketch.oversample, m, n)
    # With a sketch nearly as wide as the matrix the SVD costs no more and is exact.
    if columns >= 0.75 * min(m, n) and matrix.dense() is not None:
        return _exact(matrix, rank)
    generator = torch.Generator().manual_seed(sketch.seed)
    draw = torch.randn(n, columns, generator=generator, dtype=torch.float32)
    z, total = _first_pass(matrix, torch.linalg.qr(draw.to(matrix.device, matrix.dtype))[0])
    if total == 0.0 or not isfinite(total):
        return _nothing(matrix, total)
    # A remainder this small is the rounding of the squares themselves.
    rounding = 8 * torch.finfo(matrix.dtype).eps * total
    kept, basis = float("-inf"), torch.linalg.qr(z)[0]
    for half in range(2, 2 * sketch.power_max + 1):
        forward = half % 2 == 0
        side = _product(matrix, basis) if forward else _transposed_product(matrix, basis)
        orthonormal, triangle = torch.linalg.qr(side)
        inner, values, outer = torch.linalg.svd(triangle)
        before, kept = kept, float(values[:rank].double().square().sum())
        left_over = total - kept
        sure = left_over <= rounding
        sure = sure or _still_to_gain(kept - before, values, rank) <= sketch.tolerance * left_over
        if not sure and half < 2 * sketch.power_max:
            basis = orthonormal
            continue
        if not sure and matrix.dense() is not None:
            return _exact(matrix, rank)
        new, old = orthonormal @ inner[:, :rank], basis @ outer[:rank].T
        left, right = (new, old) if forward else (old, new)
        return Factors(left, values[:rank], right, total, f"{half} half steps", sure)
    raise AssertionError("the last half step returns")


def _still_to_gain(gain: float, values: Tensor, rank: int) -> float:
    """What further half steps would add to the norm kept, after one that added `gain`.

    What a half step leaves undone of component i shrinks by (sigma_l+1 / sigma_i)^2 (0909.4061, section
    10.4), so the gains to come are a geometric sum. The slowest kept component stands for sigma_i and the
    sketch's last value, somewhat too small, for sigma_l+1: a flat spectrum may be left up to twice as far
    off as estimated.
    """
    slowest, last = float(values[rank - 1]), float(values[-1])
    if gain <= 0 or slowest == 0:
        return 0.0
    ratio = (last / slowest) ** 2
    return float("inf") if ratio >= 1 else gain * ratio / (1 - ratio)


def _exact(matrix: BlockMatrix, rank: int) -> Factors:
    dense = matrix.dense()
    assert dense is not None
    total = float(torch.linalg.vector_norm(dense).double() ** 2)
    if total == 0.0 or not isfinite(total):
        return _nothing(matrix, total)
    left, values, right = torch.linalg.svd(dense, full_matrices=False)
    return Factors(left[:, :rank], values[:rank], right[:rank].T, total, "exact")


def _nothing(matrix: BlockMatrix, total: float) -> Factors:
    """Zero of rank 1, for a matrix that is zero or not finite (then `total` says so)."""
    m, n = matrix.shape
    empty = torch.zeros(1, dtype=matrix.dtype, device=matrix.device)
    return Factors(empty.new_zeros(m, 1), empty, empty.new_zeros(n, 1), total, "unchanged")


def _first_pass(matrix: BlockMatrix, draw: Tensor) -> tuple[Tensor, float]:
    """Z = X^T (X Q) and ||X||_F^2, reading every block once."""
    z, total = torch.zeros_like(draw), 0.0
    for _, block in matrix.blocks():
        z.addmm_(block.T, block @ draw)
        total += float(torch.linalg.vector_norm(block).double() ** 2)
    return z, total


def _product(matrix: BlockMatrix, basis: Tensor) -> Tensor:
    y = torch.empty(matrix.shape[0], basis.shape[1], dtype=matrix.dtype, device=matrix.device)
    for start, block in matrix.blocks():
        torch.mm(block, basis, out=y[start : start + block.shape[0]])
    return y


def _transposed_product(matrix: BlockMatrix, y: Tensor) -> Tensor:
    z = torch.zeros(matrix.shape[1], y.shape[1], dtype=matrix.dtype, device=matrix.device)
    for start, block in matrix.blocks():
        z.addmm_(block.T, y[start : start + block.shape[0]])
    return z
