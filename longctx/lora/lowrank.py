"""Approximates a matrix that is read in row blocks at rank r, by randomized subspace iteration.

Source: Halko, Martinsson & Tropp 2011 (0909.4061), algorithm 4.4. From a random Q [n, l], the bases of the rows and of
the columns are multiplied and orthonormalized in turns. This version departs from it in four ways: the first two
products share one pass over the blocks; the iteration may end at either side; it ends by the gain of the last half
step, which needs no extra pass; and the exact SVD is taken if the gain is not small after `power_max` steps.

Shapes: X [m, n] the matrix (m rows in blocks), r the rank, l = r + oversample the columns of the sketch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import isfinite
from typing import Protocol

import torch
from torch import Tensor

from longctx.lora.tensors import squared_norm


class BlockMatrix(Protocol):
    """A matrix X that is read as row blocks in order; blocks() may be called many times."""

    shape: tuple[int, int]
    dtype: torch.dtype
    device: torch.device

    def blocks(self) -> Iterator[tuple[int, Tensor]]: ...
    def dense(self) -> Tensor | None:
        """The complete X, or None if it does not fit the memory."""
        ...


@dataclass(frozen=True)
class Sketch:
    """The settings of the iteration.

    power_max: the largest number of steps. tolerance: the iteration ends when the estimated squared norm still to gain
    is below this share of the squared residual.
    """

    oversample: int = 16
    power_max: int = 8
    tolerance: float = 4e-3
    seed: int = 0


@dataclass(frozen=True)
class Factors:
    """The approximation X ~ left @ diag(values) @ right.T, with left [m, k], values [k] descending, right [n, k].

    total: ||X||_F^2. method: `exact`, or the number of half steps. converged: whether the tolerance was met.
    """

    left: Tensor
    values: Tensor
    right: Tensor
    total: float
    method: str
    converged: bool = True


def start_linalg(device: torch.device | str) -> None:
    """Factorise once in this thread, before several threads do.

    torch loads its CUDA linear algebra at the first call, and two threads at once end in "lazy wrapper should be called
    at most once".
    """
    if torch.device(device).type == "cuda":
        small = torch.eye(2, device=device)
        torch.linalg.svd(torch.linalg.qr(small)[1])
        torch.linalg.svdvals(small.double())


def decompose(matrix: BlockMatrix, rank: int, sketch: Sketch) -> Factors:
    """Approximate the matrix at rank `rank`, or at a lower one if it has fewer rows or columns."""
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
    """Estimate the squared norm that further half steps would add, after one that added `gain`.

    The error of component i shrinks by (sigma_l+1 / sigma_i)^2 with every half step (0909.4061, section 10.4), so the
    further gains are a geometric sum. The smallest kept value is used for sigma_i. The sketch's last value is used for
    sigma_l+1; it is somewhat too small, so the error of a flat spectrum may be up to twice the estimate.
    """
    slowest, last = float(values[rank - 1]), float(values[-1])
    if gain <= 0 or slowest == 0:
        return 0.0
    ratio = (last / slowest) ** 2
    return float("inf") if ratio >= 1 else gain * ratio / (1 - ratio)


def _exact(matrix: BlockMatrix, rank: int) -> Factors:
    dense = matrix.dense()
    assert dense is not None
    total = squared_norm(dense)
    if total == 0.0 or not isfinite(total):
        return _nothing(matrix, total)
    left, values, right = torch.linalg.svd(dense, full_matrices=False)
    return Factors(left[:, :rank], values[:rank], right[:rank].T, total, "exact")


def _nothing(matrix: BlockMatrix, total: float) -> Factors:
    """Zero factors of rank 1, for a matrix that is zero or not finite (`total` tells which)."""
    m, n = matrix.shape
    empty = torch.zeros(1, dtype=matrix.dtype, device=matrix.device)
    return Factors(empty.new_zeros(m, 1), empty, empty.new_zeros(n, 1), total, "unchanged")


def _first_pass(matrix: BlockMatrix, draw: Tensor) -> tuple[Tensor, float]:
    """Compute Z = X^T (X Q) and ||X||_F^2, reading every block once."""
    z, total = torch.zeros_like(draw), 0.0
    for _, block in matrix.blocks():
        z.addmm_(block.T, block @ draw)
        total += squared_norm(block)
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
