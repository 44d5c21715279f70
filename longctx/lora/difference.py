"""The difference tuned - base of one tensor, computed by row blocks in fp32 or fp64.

Both sides are widened before they are subtracted: bf16 has 8 bits, so a difference in bf16 would lose most of what
training changed. A difference that fits its share of the memory is kept; a larger one (a 70B's lm_head is 4 GiB in
fp32) is read again on every pass.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from math import prod

import torch
from torch import Tensor

from longctx.errors import UserError
from longctx.lora.tensors import Scratch, StoredTensors, squared_norm
from longctx.storage.writer import DTYPES, bytes_of

_BLOCK_ELEMENTS = 2**20


class Difference:
    """tuned - base of one tensor as a matrix (a lowrank.BlockMatrix); a one-dimensional tensor is one row.

    budget: bytes of difference that this worker may keep. hashed: compute `sha256`, the hash of the base tensor's
    bytes, in the first complete pass.
    """

    def __init__(
        self, base: StoredTensors, tuned: StoredTensors, name: str, *, dtype: torch.dtype, device: torch.device,
        budget: int, scratch: Scratch, hashed: bool = True,
    ) -> None:  # fmt: skip
        self.name, self.dtype, self.device = name, dtype, device
        self._base, self._tuned, self._scratch = base, tuned, scratch
        shape = base.entries[name].shape
        self.shape = (shape[0], prod(shape[1:])) if len(shape) > 1 else (1, prod(shape))
        self.sha256 = ""
        self._hashed = hashed
        self._resident = len(shape) == 1 or prod(self.shape) * dtype.itemsize <= budget
        self._kept: Tensor | None = None

    def blocks(self) -> Iterator[tuple[int, Tensor]]:
        """Yield (first row, block [rows, columns]); a block is valid until the next one is requested."""
        if self._kept is not None:
            yield 0, self._kept
            return
        rows, columns = self.shape
        whole = self._buffer("whole", rows) if self._resident else None
        digest = hashlib.sha256()
        step = max(1, _BLOCK_ELEMENTS // columns)
        for start in range(0, rows, step):
            stop = min(rows, start + step)
            block = whole[start:stop] if whole is not None else self._buffer("block", stop - start)
            self._read(start, stop, block, digest if self._hashed and not self.sha256 else None)
            yield start, block
        self.sha256 = self.sha256 or (digest.hexdigest() if self._hashed else "")
        self._kept = whole

    def dense(self) -> Tensor | None:
        """The complete difference, or None if it does not fit its memory."""
        if self._kept is None and self._resident:
            for _ in self.blocks():
                pass
        return self._kept

    def norm_squared(self) -> float:
        """Compute ||tuned - base||_F^2."""
        return sum(squared_norm(block) for _, block in self.blocks())

    def residual_squared(self, left: Tensor, right: Tensor, scale: float) -> float:
        """Compute ||tuned - base - scale * left @ right||_F^2 with left [rows, r] and right [r, columns].

        This overwrites a kept difference, which is read again afterwards if it is needed.
        """
        total = 0.0
        left, right = left.to(self.device, self.dtype), right.to(self.device, self.dtype)
        for start, block in self.blocks():
            block.addmm_(left[start : start + block.shape[0]], right, alpha=-scale)
            total += squared_norm(block)
        self._kept = None
        return total

    def _buffer(self, slot: str, rows: int) -> Tensor:
        shape = (rows, self.shape[1])
        if self.device.type == "cpu":
            return self._scratch.floats(slot, shape, self.dtype)
        return torch.empty(shape, dtype=self.dtype, device=self.device)

    def _read(self, start: int, stop: int, block: Tensor, digest: "hashlib._Hash | None") -> None:  # noqa: UP037
        first, last = (start, stop) if len(self._base.entries[self.name].shape) > 1 else (0, None)
        sides = []
        for side, tensors in (("base", self._base), ("tuned", self._tuned)):
            entry = tensors.entries[self.name]
            size = (stop - start) * self.shape[1] * DTYPES[entry.dtype].itemsize
            raw = self._scratch.bytes(side, size)
            part = tensors.read(self.name, first, last, out=raw).view(stop - start, self.shape[1])
            sides.append(part if tensors.rounding is None else part.to(tensors.rounding))
            if side == "base" and digest is not None:
                digest.update(bytes_of(raw))
        block.copy_(sides[1])
        block.sub_(sides[0].to(self.device))


def require_finite(norm_squared: float, name: str, base: str, tuned: str) -> None:
    """Raise UserError if a difference is NaN or infinite: a shard is damaged, or the training diverged."""
    if norm_squared != norm_squared or norm_squared == float("inf"):
        raise UserError(
            f"{name} is not finite in base={base} or tuned={tuned} (NaN or infinity): the shard is damaged or the "
            "training diverged; nothing was written"
        )
