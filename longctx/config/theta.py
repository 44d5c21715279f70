"""What `longctx theta` takes: where it starts, where it shall go, how to search for better thetas."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from longctx.config.base import Count, Format, Length, Text, schema
from longctx.config.curriculum import CurriculumConfig, RuleField
from longctx.config.data import DataConfig
from longctx.config.model import ModelConfig


def _given(value: Any) -> Any:
    """A group of which nothing is set is a group not given: the root file lists `model.path: null`."""
    return None if isinstance(value, Mapping) and all(item is None for item in value.values()) else value


@schema
class SearchConfig:
    """The empirical part: which thetas are tried at a stage, on how much text, and when the bracket is narrow
    enough.

    stage: the stage searched (None: the last). bracket: the first thetas lie between rule / bracket and
    rule * bracket. points: thetas of the first round; rounds: golden-section steps around the best.
    documents: held-out sequences of the stage's length; needles: haystacks per trial, a needle at each of
    five depths. needle_weight: how much the needles' answer loss counts beside the text's last-quarter loss.
    adapt_steps: optimizer steps per candidate, thrown away afterwards; adapt_lr: their rate. attempts: how
    often a best value on the edge widens the bracket.
    """

    stage: str | None = None
    bracket: float = 8.0
    points: int = 7
    rounds: int = 4
    attempts: int = 2
    documents: int = 8
    needles: int = 4
    needle_weight: float = 0.25
    adapt_steps: int = 0
    adapt_lr: float = 3e-4
    seed: int = 0

    def __post_init__(self) -> None:
        if self.bracket <= 1:
            raise ValueError(f"bracket={self.bracket} must be above 1: thetas from rule/bracket to rule*bracket")
        if self.points < 3:
            raise ValueError(f"points={self.points} must be 3 or more, or there is nothing between the edges")
        for name in ("rounds", "attempts", "needles", "adapt_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must be 0 or more")
        if self.documents < 1:
            raise ValueError(f"documents={self.documents} must be 1 or more")
        if self.needle_weight < 0:
            raise ValueError(f"needle_weight={self.needle_weight} must be 0 or more")


@schema
class ThetaConfig:
    """The root of configs/theta.yaml.

    model.path, or head_dim and theta (and from): what is there. to, or a curriculum: where it shall go. rule:
    the rule of `to`. png: where the picture goes. search: look for a better theta with the model itself.
    """

    model: Annotated[ModelConfig | None, BeforeValidator(_given)] = None
    head_dim: int | None = None
    theta: Count | None = None
    from_: Length | None = Field(default=None, alias="from")
    to: Length | None = None
    rule: RuleField | None = None
    curriculum: CurriculumConfig | None = None
    png: Text | None = None
    format: Format = "text"
    search: bool = False
    trials: SearchConfig = SearchConfig()
    data: DataConfig | None = None
    name: Text = "theta"
    run_dir: str = ""
    nproc: int = 1

    @property
    def folder(self) -> str:
        """Where trials, picture and the stage override file go."""
        return self.run_dir or f"runs/{self.name}"
