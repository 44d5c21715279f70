"""Config schema of `longctx theta`: where it starts, where it shall go, how to search for better thetas."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from longctx.config.base import (
    AboveZero,
    Format,
    Given,
    HeadDim,
    NotNegative,
    PerMachine,
    Positive,
    RunName,
    Samples,
    Seed,
    Theta,
    Window,
    ZeroOrMore,
    schema,
)
from longctx.config.curriculum import CurriculumConfig, Rate, RuleField
from longctx.config.data import DataConfig
from longctx.config.model import ModelConfig


def _given(value: Any) -> Any:
    """A group of which nothing is set is a group not given: the root file lists `model.path: null`."""
    return None if isinstance(value, Mapping) and all(item is None for item in value.values()) else value


@schema
class SearchConfig:
    """Which thetas are tried at a stage, on how much text, and when the bracket is narrow enough."""

    stage: str | None = None  #: the stage of the curriculum that is searched; null: the last
    #: the first thetas lie between rule / bracket and rule * bracket
    bracket: Annotated[AboveZero, Field(gt=1, le=1000)] = 8.0
    points: Annotated[Positive, Field(ge=3, le=1000)] = 7  #: thetas of the first round, even on log theta
    rounds: NotNegative = 4  #: golden-section steps around the best
    attempts: NotNegative = 2  #: how often the bracket is moved when the best lies on its edge
    documents: Samples = 8  #: held-out sequences of the stage's length
    needles: Annotated[NotNegative, Field(le=100_000)] = 4  #: haystacks per trial, a needle at each of five depths
    needle_weight: ZeroOrMore = 0.25  #: the needles' answer loss beside the text's last-quarter loss
    adapt_steps: NotNegative = 0  #: optimizer steps per candidate, thrown away afterwards
    adapt_lr: Rate = 3e-4  #: their learning rate
    seed: Seed = 0  #: of documents and needles


@schema
class ThetaConfig:
    """The root of configs/theta.yaml: where the rope starts and where it goes."""

    model: Annotated[ModelConfig | None, BeforeValidator(_given)] = None
    head_dim: Annotated[HeadDim, Field(ge=4)] | None = (
        None  #: instead of a model: its head size, theta and window (from)
    )
    theta: Theta | None = None  #: present theta
    from_: Window | None = Field(default=None, alias="from")  #: window in tokens; null: the model's
    to: Window | None = None  #: target length
    rule: RuleField | None = None  #: of `to`; null: dynamic-ntk
    curriculum: CurriculumConfig | None = None  #: a table per stage, instead of `to`
    png: Given | None = None  #: a picture of wavelengths against the window, before and after
    format: Format = "text"  #: of what is printed
    search: bool = False  #: try thetas around the rule's on held-out documents (needs the model's weights)
    trials: SearchConfig = SearchConfig()
    data: DataConfig | None = None  #: of a search
    name: RunName = "theta"  #: results go to runs/NAME
    run_dir: str = ""  #: the folder of a search, instead of runs/NAME
    nproc: PerMachine = 1  #: ranks that share a long sequence by ring attention while searching

    @property
    def folder(self) -> str:
        """Where trials, picture and the stage override file go."""
        return self.run_dir or f"runs/{self.name}"
