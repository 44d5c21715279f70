"""The best rank-r approximation of a matrix seen only through row blocks: randomized subspace iteration.

Halko, Martinsson & Tropp 2011 (0909.4061), algorithms 4.3/4.4, arranged for blocks: with Q [n, l]
orthonormal one pass gives Y = X Q and Z = X^T Y, and orth(Z) is the next Q. Departures: whether to go on is
decided by what the last half steps still gained, which costs no pass, either side may finish, and where the
gain has not died out after `power_max` steps the exact SVD is taken.

X [m, n] the matrix (m rows in blocks)   r rank kept   l = r + oversample columns of the sketch
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
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
    power_max: int = 6
    tolerance: float = 8e-3
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
    y, z, total = _fused_pass(matrix, torch.linalg.qr(draw.to(matrix.device, matrix.dtype))[0])
    if total == 0.0:
        return _zero(matrix)
    # A remainder this small is the rounding of the squares themselves.
    rounding = 8 * torch.finfo(matrix.dtype).eps * total
    kept = _energy_after_half_step(y, z, rank)
    gained = kept - _top(_gram(y), rank)
    basis = torch.linalg.qr(z)[0]
    for half in range(2, 2 * sketch.power_max + 1):
        forward = half % 2 == 0
        side = _product(matrix, basis) if forward else _transposed_product(matrix, basis)
        orthonormal, triangle = torch.linalg.qr(side)
        inner, values, outer = torch.linalg.svd(triangle)
        before, kept = (kept, gained), float(values[:rank].double().square().sum())
        gained = kept - before[0]
        # The first gains are the strong directions'; only from the third on do they tell about the tail.
        converged = half > 2 and _still_to_gain(gained, before[1]) <= sketch.tolerance * (total - kept)
        if converged or total - kept <= rounding or half == 2 * sketch.power_max:
            if not converged and total - kept > rounding and matrix.dense() is not None:
                return _exact(matrix, rank)
            new, old = orthonormal @ inner[:, :rank], basis @ outer[:rank].T
            left, right = (new, old) if forward else (old, new)
            sure = converged or total - kept <= rounding
            return Factors(left, values[:rank], right, total, f"{half} half steps", sure)
        basis = orthonormal
    raise AssertionError("the last half step returns")


def _still_to_gain(gain: float, gain_before: float) -> float:
    """What further half steps would add to the norm kept, if gains went on falling by sqrt(the last ratio)
    each.

    Gains fall geometrically, faster at first: the square root keeps the estimate on the safe side (it was 2
    to 10 times the truth where that was known).
    """
    if gain <= 0:
        return 0.0
    ratio = (gain / max(gain_before, gain)) ** 0.5
    return float("inf") if ratio >= 1 else gain * ratio / (1 - ratio)


def _exact(matrix: BlockMatrix, rank: int) -> Factors:
    dense = matrix.dense()
    assert dense is not None
    left, values, right = torch.linalg.svd(dense, full_matrices=False)
    total = float(torch.linalg.vector_norm(dense).double() ** 2)
    if total == 0.0:
        return _zero(matrix)
    return Factors(left[:, :rank], values[:rank], right[:rank].T, total, "exact")


def _zero(matrix: BlockMatrix) -> Factors:
    m, n = matrix.shape
    empty = torch.zeros(1, dtype=matrix.dtype, device=matrix.device)
    return Factors(empty.new_zeros(m, 1), empty, empty.new_zeros(n, 1), 0.0, "unchanged")


def _fused_pass(matrix: BlockMatrix, basis: Tensor) -> tuple[Tensor, Tensor, float]:
    """Y = X Q, Z = X^T Y and ||X||_F^2, reading every block once."""
    y = torch.empty(matrix.shape[0], basis.shape[1], dtype=matrix.dtype, device=matrix.device)
    z = torch.zeros_like(basis)
    total = 0.0
    for start, block in matrix.blocks():
        part = y[start : start + block.shape[0]]
        torch.mm(block, basis, out=part)
        z.addmm_(block.T, part)
        total += float(torch.linalg.vector_norm(block).double() ** 2)
    return y, z, total


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


def _energy_after_half_step(y: Tensor, z: Tensor, rank: int) -> float:
    """Squared norm that the best rank-r part of orth(Y) orth(Y)^T X keeps, from Z = X^T Y alone.

    orth(Y) = Y T with T = V lambda^-1/2 from Y^T Y = V lambda V^T, so X^T orth(Y) = Z T.
    """
    eigenvalues, vectors = torch.linalg.eigh(_gram(y))
    keep = eigenvalues > 1e-12 * eigenvalues[-1]
    whiten = vectors[:, keep] * eigenvalues[keep].rsqrt()
    return _top(whiten.T @ _gram(z) @ whiten, rank)


def _gram(y: Tensor) -> Tensor:
    """Y^T Y [l, l] in float64, on the CPU: small, and its small eigenvalues matter."""
    gram = torch.zeros(y.shape[1], y.shape[1], dtype=torch.float64, device=y.device)
    for part in y.split(16384):
        wide = part.double()
        gram.addmm_(wide.T, wide)
    return gram.cpu()


def _top(gram: Tensor, rank: int) -> float:
    return float(torch.linalg.eigvalsh(gram)[-rank:].clamp_min(0).sum())
