"""What an evaluation can be told: which lengths and depths, how many needles a cell, which phrasing."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from longctx.config.base import Format, Length, Positive, Text, schema
from longctx.config.data import DataConfig
from longctx.config.model import ModelConfig

NEEDLE = "The pass key of {key} is {value}."
QUESTION = "What is the pass key of {key}? The pass key of {key} is {value}."


@schema
class NeedleConfig:
    """The needle grid: context lengths by depths."""

    lengths: tuple[Length, ...] = (512, 1024, 2048, 4096, 8192)  #: context lengths in tokens, question included
    depths: tuple[Annotated[float, Field(ge=0, le=1)], ...] = (0.0, 0.25, 0.5, 0.75, 1.0)  #: 0: the haystack's start
    per_cell: Positive = 10  #: needles per cell and seed
    seeds: tuple[int, ...] = (11, 22, 33)
    single: bool = False  #: one needle per haystack, instead of one at every depth, all asked for
    needle: str = NEEDLE  #: the phrasing, with {key} and {value}
    question: str = QUESTION

    def __post_init__(self) -> None:
        if len(set(self.depths)) != len(self.depths):
            raise ValueError(f"depths={list(self.depths)} must be different numbers")
        if not self.lengths or not self.seeds or not self.depths:
            raise ValueError("lengths, depths and seeds need at least one entry each")


@schema
class EvalConfig:
    """The needle grid and held-out loss of one model, as plain transformers loads it."""

    model: ModelConfig
    data: DataConfig
    source: Text = "stdlib"  #: which of data's sources is haystack and held-out text
    needle: NeedleConfig = NeedleConfig()
    loss_lengths: tuple[Length, ...] = (512,)  #: windows of held-out text
    loss_windows: int = 32  #: how many of them
    bins: int = 8  #: stretches of the window in the loss by position
    out: Text | None = None  #: folder for needle.json and needle.png; null: on screen only
    cache: Text = "runs/data"
    format: Format = "text"
