"""Merges the attention of one block into the accumulated result, in place and on slices.

With w = sigmoid(lse_b - lse): out += w (out_b - out), lse = logaddexp(lse, lse_b). Both are stable for any lse;
log(1 + exp(x)) is not. Accumulators are fp32 (fp64 for fp64) whatever type the kernel returns, because half-precision
partial sums drift as the ring grows. The rank's own block comes first, so every row starts from a finite lse.

Shapes: out [B, H, S, D], lse [B, H, S].
"""

from __future__ import annotations

import torch
from torch import Tensor


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def merge_(out: Tensor, lse: Tensor, block_out: Tensor, block_lse: Tensor) -> None:
    """Merge a block into the slices `out`, `lse` (accumulator type) in place."""
    block_lse = block_lse.to(lse.dtype)
    weight = torch.sigmoid(block_lse - lse)
    out.lerp_(block_out.to(out.dtype), weight.unsqueeze(-1))
    torch.logaddexp(lse, block_lse, out=lse)


class Accumulator:
    """Accumulates out and lse of a rank's queries; out has the strides of `empty_like(q)`, as the op promises."""

    def __init__(self, q: Tensor) -> None:
        self.q = q
        self.dtype = accumulator_dtype(q.dtype)
        self.out: Tensor | None = None
        self.lse: Tensor | None = None

    def own(self, parts: list[tuple[slice, Tensor, Tensor]]) -> None:
        """Set the results of the rank's own block, by query rows; rows of padding get out 0 and lse -inf."""
        rows = self.q.shape[2]
        if len(parts) == 1 and parts[0][0] == slice(0, rows):
            self.out, self.lse = parts[0][1], parts[0][2].to(self.dtype)
            return
        self.out = torch.zeros_like(self.q, dtype=self.dtype)
        self.lse = self.q.new_full(self.q.shape[:3], float("-inf"), dtype=self.dtype)
        for where, out, lse in parts:
            self.out[:, :, where] = out
            self.lse[:, :, where] = lse

    def add(self, where: slice, out: Tensor, lse: Tensor) -> None:
        assert self.out is not None
        assert self.lse is not None
        if self.out.dtype != self.dtype:
            self.out = self.out.to(self.dtype)
        merge_(self.out[:, :, where], self.lse[:, :, where], out, lse)

    def result(self) -> tuple[Tensor, Tensor]:
        """Return out in q's type and strides and lse contiguous, copying only what differs."""
        assert self.out is not None
        assert self.lse is not None
        return like(self.out, self.q), self.lse.contiguous()


def like(x: Tensor, model: Tensor) -> Tensor:
    """Return x with the type and strides of `empty_like(model)`, copied only if they differ."""
    if x.dtype == model.dtype and x.stride() == torch.empty_like(model, device="meta").stride():
        return x
    return torch.empty_like(model).copy_(x)
