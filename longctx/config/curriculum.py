"""What a curriculum file may say: stages by name, each with a length, a theta or a rule, tokens, batch and
rate.

Values a stage leaves out come from the curriculum; numbers are resolved in longctx.curriculum, which knows
the model. Nothing here changes a value other than reading its unit.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from longctx.config.base import (
    Count,
    HeadDim,
    NotNegative,
    Positive,
    Share,
    ShareAboveZero,
    Theta,
    Window,
    ZeroOrMore,
    schema,
)
from longctx.rope import AnyRule

LayoutName = Literal["zigzag", "contiguous"]
Rate = ShareAboveZero
RateCurve = Literal["constant", "cosine", "linear", "continue"]


def _named(value: Any) -> Any:
    """`rule=ntk` is short for `rule={name: ntk}`; names may be written with underscores."""
    value = {"name": value} if isinstance(value, str) else value
    if isinstance(value, Mapping) and isinstance(value.get("name"), str):
        return {**value, "name": value["name"].replace("_", "-")}
    return value


RuleField = Annotated[AnyRule, Field(discriminator="name"), BeforeValidator(_named)]


@schema
class LearningRateConfig:
    """A stage's learning rate: linear warm-up to peak, then constant, or down to final by cosine or linear."""

    peak: Rate | None = None  #: the rate after warm-up
    final: ZeroOrMore | None = None  #: the rate at the end of the decay; null: 0, or the peak when constant
    warmup_steps: NotNegative | None = None  #: steps from 0 to the peak
    kind: RateCurve | None = None  #: continue: the curve of the stage before, stretched over both; null: constant


@schema
class AdvanceConfig:
    """Leave a stage early once the loss on the last quarter of its window has flattened."""

    enabled: bool = False  #: whether a stage may end early
    steps: Positive = 20  #: the mean loss of the last so many steps is compared with that of as many before them
    min_drop: Annotated[Share, Field(lt=1)] = 0.002  #: the stage ends when the loss drops by a smaller share than this
    min_share: Share = 0.25  #: share of the stage's steps before which it does not end


@schema
class StageConfig:
    """One stage: exactly one of theta and rule, of tokens and steps, of batch and batch_tokens.

    Where rule, lr, mix, layout or advance is null, the curriculum's value holds.
    """

    seq_len: Window  #: tokens per sequence: 65536, 64k, 1M
    theta: Theta | None = None  #: rope theta of the stage, instead of a rule
    rule: RuleField | None = None  #: rule for theta or frequencies, instead of theta
    tokens: Count | None = None  #: tokens of the stage, rounded up to whole batches
    steps: Positive | None = None  #: optimizer steps of the stage, instead of tokens
    batch: Positive | None = None  #: sequences per optimizer step
    batch_tokens: Count | None = None  #: tokens per optimizer step, instead of batch
    lr: LearningRateConfig = LearningRateConfig()
    mix: str | None = None  #: name of a data mix (data.mixes)
    layout: LayoutName | None = None  #: which tokens a rank holds
    advance: AdvanceConfig | None = None


@schema
class MadeForConfig:
    """The rope a curriculum was made for; `longctx theta` begins there when no model is named."""

    head_dim: HeadDim  #: head dimension of the model
    theta: Theta  #: rope theta of the model
    window: Window  #: window of the model, in tokens


@schema
class CurriculumConfig:
    """Stages by name in order of length, and what they share."""

    stages: dict[str, StageConfig]
    #: rule of the stages that name neither theta nor rule: ntk, or {name: dynamic-ntk, factor: 4}
    rule: RuleField | None = None
    lr: LearningRateConfig = LearningRateConfig()
    mix: str = "default"  #: name of a data mix (data.mixes)
    layout: LayoutName = "zigzag"  #: which tokens a rank holds; zigzag balances causal attention
    advance: AdvanceConfig = AdvanceConfig()
    only: list[str] | None = None  #: names of the stages to run
    scratch: bool = False  #: the model is new: lengths may repeat and lie under its window
    #: stages may be shorter than the model's window, which then stays: a fine-tune that extends nothing
    keep_window: bool = False
    #: file that `longctx theta search=true` wrote; replaces the thetas of the stages it names, whose rule stays
    theta_file: str | None = None
    made_for: MadeForConfig | None = None

    def __post_init__(self) -> None:
        if not self.stages:
            raise ValueError("stages is empty; a curriculum needs at least one, such as stages: {s64k: {...}}")
        for name in self.stages:
            if not re.fullmatch(r"\w[^/\\\0]*", name):
                raise ValueError(
                    f"stages.{name}: {name!r} cannot be the name of a folder, and a stage's results go to "
                    "RUN/stages/NAME; begin it with a letter or a digit, and leave out slashes"
                )
