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
    needle_weight: ZeroOrMore = 0.25  #: weight of the needles' answer loss beside the text's last-quarter loss
    adapt_steps: NotNegative = 0  #: optimizer steps per candidate, thrown away afterwards
    adapt_lr: Rate = 3e-4  #: learning rate of the adapt_steps
    seed: Seed = 0  #: random seed of documents and needles


@schema
class ThetaConfig:
    """The root of configs/theta.yaml: where the rope starts and where it goes."""

    model: Annotated[ModelConfig | None, BeforeValidator(_given)] = None
    #: in place of a model: its head dimension, given with theta and from
    head_dim: Annotated[HeadDim, Field(ge=4)] | None = None
    theta: Theta | None = None  #: present rope theta, with head_dim
    from_: Window | None = Field(default=None, alias="from")  #: window in tokens; null: the model's
    to: Window | None = None  #: target length, in tokens
    rule: RuleField | None = None  #: rule that leads to `to`; null: dynamic-ntk
    curriculum: CurriculumConfig | None = None  #: stages, each with a table, instead of `to`
    png: Given | None = None  #: file for a picture of wavelengths against the window, before and after
    format: Format = "text"  #: format of what is printed
    search: bool = False  #: try thetas around the rule's on held-out documents (needs the model's weights)
    trials: SearchConfig = SearchConfig()
    data: DataConfig | None = None  #: documents of a search
    name: RunName = "theta"  #: name of the results, which go to runs/NAME
    run_dir: str = ""  #: folder of the results, instead of runs/NAME
    nproc: PerMachine = 1  #: ranks that share a long sequence by ring attention while searching

    @property
    def folder(self) -> str:
        """Where trials, picture and the stage override file go."""
        return self.run_dir or f"runs/{self.name}"
