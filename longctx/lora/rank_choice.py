"""Chooses LoRA ranks module by module, for a share of the squared norm or for a size of the adapter in bytes."""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from longctx.errors import UserError
from longctx.lora.lowrank import BlockMatrix, Factors, Sketch, decompose

_FIRST_RANK = 16
# The header entry and the padding of one pair of factors.
_BYTES_PER_MODULE = 640


def rank_for_share(matrix: BlockMatrix, share: float, max_rank: int, sketch: Sketch) -> Factors:
    """The factors of lowest rank that keep `share` of ||X||_F^2, at most max_rank.

    The rank of the sketch doubles until it keeps the share.
    """
    limit = min(max_rank, *matrix.shape)
    rank = min(_FIRST_RANK, limit)
    while True:
        factors = decompose(matrix, rank, sketch)
        kept = factors.values.double().square().cumsum(0)
        enough = int((kept < share * factors.total).sum()) + 1
        if enough <= len(factors.values) or rank >= limit:
            cut = min(enough, len(factors.values))
            return replace(
                factors, left=factors.left[:, :cut], values=factors.values[:cut], right=factors.right[:, :cut]
            )
        rank = min(2 * rank, limit)


def fit_size(spectra: Mapping[str, Tensor], cost: Mapping[str, int], size: float) -> dict[str, int]:
    """Choose the rank of each module so that all factors fit into `size` bytes.

    Each step adds the component with the most squared norm per byte. spectra: singular values, descending. cost: bytes
    per rank. Every module gets at least rank 1; raises UserError if not even that fits.
    """
    ranks = dict.fromkeys(spectra, 1)
    left = size - sum(cost[name] + _BYTES_PER_MODULE for name in spectra)
    if left < 0:
        raise UserError(
            f"size_mb={size / 1e6:g} is less than rank 1 of every module needs, {(size - left) / 1e6:.3g} MB; give "
            "more, or a dtype of fewer bytes (configs/lora_extract.yaml)"
        )
    queue = [(-_gain(values, 1, cost[name]), name) for name, values in spectra.items() if len(values) > 1]
    heapq.heapify(queue)
    while queue:
        _, name = heapq.heappop(queue)
        if cost[name] > left:
            continue
        ranks[name] += 1
        left -= cost[name]
        if ranks[name] < len(spectra[name]):
            heapq.heappush(queue, (-_gain(spectra[name], ranks[name], cost[name]), name))
    return ranks


def _gain(values: Tensor, index: int, cost: int) -> float:
    return float(values[index]) ** 2 / cost
