"""The numbers of a needle grid: how often the answer was found, per context length and depth.

A cell's accuracy is hits / asked. Pooled accuracies weigh every cell equally, as published grids do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Grid:
    """Counts of a needle grid: hits and asked, int64 [seeds, lengths, depths]; label: the model's name."""

    label: str
    lengths: tuple[int, ...]
    depths: tuple[float, ...]
    seeds: tuple[int, ...]
    hits: np.ndarray
    asked: np.ndarray

    @property
    def cells(self) -> np.ndarray:
        """Accuracy [lengths, depths], pooled over seeds; NaN for a cell without questions."""
        asked = self.asked.sum(0)
        return np.where(asked > 0, self.hits.sum(0) / np.maximum(asked, 1), np.nan)

    def by_length(self) -> dict[int, float]:
        """Return {length: accuracy pooled over depths and seeds}."""
        return {length: float(np.nanmean(row)) for length, row in zip(self.lengths, self.cells, strict=True)}

    def pooled(self) -> float:
        """Return the accuracy pooled over all cells."""
        return float(np.nanmean(self.cells))

    def by_seed(self) -> dict[int, float]:
        """Return {seed: accuracy pooled over all cells}, which shows how much seeds differ."""
        rate = self.hits / np.maximum(self.asked, 1)
        return {seed: float(rate[i].mean()) for i, seed in enumerate(self.seeds)}

    def to_json(self) -> dict[str, object]:
        return {
            "label": self.label,
            "lengths": list(self.lengths),
            "depths": list(self.depths),
            "seeds": list(self.seeds),
            "hits": self.hits.tolist(),
            "asked": self.asked.tolist(),
            "pooled": self.pooled(),
            "by_length": self.by_length(),
            "by_seed": self.by_seed(),
        }


def percent(share: float, digits: int = 1) -> str:
    """A share from 0 to 1 in percent, without the sign, as tables, pictures and reports write it.

    digits: decimal places, or as many more as keep a share that is neither 0 nor 1 from reading 0 or 100.
    """
    exact = 100 * share
    while float(text := f"{exact:.{digits}f}") != exact and float(text) in (0, 100):
        digits += 1
    return text


def from_json(values: dict[str, object]) -> Grid:
    """Read the grid that `to_json` wrote."""

    def numbers(key: str) -> Sequence[float]:
        found = values[key]
        assert isinstance(found, list)
        return found

    return Grid(
        label=str(values["label"]),
        lengths=tuple(int(x) for x in numbers("lengths")),
        depths=tuple(float(x) for x in numbers("depths")),
        seeds=tuple(int(x) for x in numbers("seeds")),
        hits=np.array(values["hits"], np.int64),
        asked=np.array(values["asked"], np.int64),
    )
