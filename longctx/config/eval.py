"""What an evaluation may say: which lengths and depths, how many needles a cell, which phrasing."""

from __future__ import annotations

from longctx.config.base import Format, Length, Text, schema
from longctx.config.data import DataConfig
from longctx.config.model import ModelConfig

NEEDLE = "The pass key of {key} is {value}."
QUESTION = "What is the pass key of {key}? The pass key of {key} is {value}."


@schema
class NeedleConfig:
    """lengths: context lengths in tokens, question included; depths: 0 the haystack's start, 1 its end.

    per_cell: needles per cell and seed; single: one needle a haystack instead of one at every depth;
    needle, question: the phrasing, with {key} and {value}.
    """

    lengths: tuple[Length, ...] = (512, 1024, 2048, 4096, 8192)
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    per_cell: int = 10
    seeds: tuple[int, ...] = (11, 22, 33)
    single: bool = False
    needle: str = NEEDLE
    question: str = QUESTION

    def __post_init__(self) -> None:
        if self.per_cell < 1:
            raise ValueError(f"per_cell={self.per_cell} must be 1 or more")
        if len(set(self.depths)) != len(self.depths) or not all(0 <= d <= 1 for d in self.depths):
            raise ValueError(f"depths={list(self.depths)} must be different numbers between 0 and 1")
        if not self.lengths or not self.seeds or not self.depths:
            raise ValueError("lengths, depths and seeds need at least one entry each")


@schema
class EvalConfig:
    """`longctx eval model.path=FOLDER`: the needle grid and held-out loss of one model, as plain transformers loads it.

    source: which of data's sources serves as haystack and as held-out text. loss_lengths, loss_windows: windows of
    held-out text. bins: stretches of the window in the loss by position. out: folder for results (None: on screen).
    """

    model: ModelConfig
    data: DataConfig
    source: Text = "stdlib"
    needle: NeedleConfig = NeedleConfig()
    loss_lengths: tuple[Length, ...] = (512,)
    loss_windows: int = 32
    bins: int = 8
    out: Text | None = None
    cache: Text = "runs/data"
    format: Format = "text"
