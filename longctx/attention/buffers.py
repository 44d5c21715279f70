"""The executor's memory: communication buffers that the layers of a model share, and sums of gradients."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class BufferPool:
    """A pool of buffers by shape and type; each call returns its buffers, so the layers of a model share one set.

    It holds the buffers of one shape of K: batches of changing lengths would otherwise keep a set for every length.
    """

    free: dict[tuple, list[Tensor]] = field(default_factory=lambda: defaultdict(list))
    total: int = 0  # bytes allocated so far for calls of this shape: the communication buffers of the executor
    shape: tuple[int, ...] = ()

    def begin(self, shape: tuple[int, ...]) -> None:
        """Begin a call on K of this shape; the buffers of another shape are dropped."""
        if shape != self.shape:
            self.clear()
            self.shape = shape

    def take(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        stack = self.free[shape, dtype, device]
        if stack:
            return stack.pop()
        with torch.inference_mode(False):  # a training step may take the buffer of an evaluation
            buffer = torch.empty(shape, dtype=dtype, device=device)
        self.total += buffer.nbytes
        return buffer

    def give(self, buffers: list[Tensor]) -> None:
        for buffer in buffers:
            self.free[tuple(buffer.shape), buffer.dtype, buffer.device].append(buffer)

    def clear(self) -> None:
        self.free.clear()
        self.total = 0


class GradientSum:
    """A sum of gradients [B, H, L, D]; its first part is copied, where it is whole, instead of added to zeros.

    begun: whether the memory holds a sum, as it does where one has arrived from another rank.
    """

    def __init__(self, total: Tensor, *, begun: bool = False) -> None:
        self.total, self.begun = total, begun

    def begin(self) -> None:
        """Begin a new sum; what the memory holds does not count."""
        self.begun = False

    def add(self, where: slice, part: Tensor) -> None:
        """Add `part` to the tokens `where`."""
        if not self.begun and part.shape[2] == self.total.shape[2]:
            self.total.copy_(part)
            self.begun = True
            return
        self.settled()[:, :, where].add_(part)

    def settled(self) -> Tensor:
        """The sum, zero if nothing was added."""
        if not self.begun:
            self.total.zero_()
            self.begun = True
        return self.total
