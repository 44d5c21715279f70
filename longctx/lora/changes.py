"""Applies one part of an adapter to a tensor, block of rows by block of rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from longctx.lora.adapter import Adapter, FactorPair

Apply = Callable[[Tensor, int], None]
# The order in which PEFT applies the parts: stored tensors first, then additions to them.
ORDER = ("replaced", "rows", "factors", "bias", "exact")


@dataclass(frozen=True)
class TensorChange:
    """The change that one part of an adapter makes to the first `rows` rows of `tensor`, called w here.

    how: `replaced` (w + scale * (new - w)), `rows` (the same for single rows), `factors` (w + scale * pair.scale * B
    A), `bias` (w + scale * factor * b, for factors that have a bias) or `exact` (w + scale * difference). source: a
    FactorPair, or the stored tensor's name.
    """

    tensor: str
    how: str
    adapter: Adapter
    source: FactorPair | str
    scale: float
    rows: int
    factor: float = 1.0
    indices: tuple[int, ...] = ()

    @property
    def effect(self) -> tuple[Any, ...]:
        """A key that two changes share if they do the same to their tensors."""
        source: Any = self.source
        if isinstance(source, FactorPair):
            source = (source.a, source.b, source.embedding, source.scale)
        return self.how, self.adapter.path, source, self.scale, self.rows, self.factor, self.indices

    def load(self) -> Apply:
        """Return a function (block, first row) that applies the change in place to a block of widened rows."""
        if isinstance(self.source, FactorPair):
            return self._add_factors(self.source)
        if self.how == "rows":
            return self._put_rows(self.adapter.weights.read(self.source))
        if self.how == "replaced":
            return self._move(self.source)
        if self.how == "bias":
            return _add(self.adapter.weights.read(self.source), self.scale * self.factor)
        return _add(self.adapter.delta(self.source), self.scale)

    def _add_factors(self, pair: FactorPair) -> Apply:
        left, right = self.adapter.factors(pair)

        def apply(block: Tensor, start: int) -> None:
            rows = left[start : min(start + block.shape[0], self.rows)].to(block.dtype)
            if rows.shape[0]:
                block[: rows.shape[0]].addmm_(rows, right.to(block.dtype), alpha=self.scale * pair.scale)

        return apply

    def _move(self, stored: str) -> Apply:
        def apply(block: Tensor, start: int) -> None:
            stop = min(start + block.shape[0], self.rows)
            if stop > start:
                new = self.adapter.weights.read(stored, start, stop).to(block.dtype)
                block[: stop - start].lerp_(new, self.scale)

        return apply

    def _put_rows(self, new: Tensor) -> Apply:
        def apply(block: Tensor, start: int) -> None:
            for place, row in enumerate(self.indices):
                if start <= row < start + block.shape[0]:
                    block[row - start].lerp_(new[place].to(block.dtype), self.scale)

        return apply


def _add(difference: Tensor, scale: float) -> Apply:
    def apply(block: Tensor, start: int) -> None:
        block.add_(difference[start : start + block.shape[0]].to(block.dtype), alpha=scale)

    return apply
