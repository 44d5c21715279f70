"""One case of `bench attention`, and the matrix rate with which its figures are compared."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class AttentionCase:
    """One case: causal attention, forward and backward, of `length` tokens."""

    length: int
    batch: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: str

    @property
    def flop(self) -> float:
        """Forward and backward: 2 + 5 times S^2 Hq D per sequence (half of the square is masked)."""
        return 7.0 * self.batch * self.heads * self.head_dim * float(self.length) ** 2


def matrix_rate(device: Any, dtype: Any, size: int) -> float:
    """Measure the rate of a square matrix product in flop/s, the best of six."""
    import torch

    a = torch.randn(size, size, device=device, dtype=dtype)
    b = torch.randn(size, size, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(6):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        torch.mm(a, b)
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2.0 * size**3 / best
