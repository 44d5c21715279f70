"""What a curriculum file may say: stages by name, each with a length, a theta or a rule, tokens, batch and
rate.

Values a stage leaves out come from the curriculum; numbers are resolved in longctx.curriculum, which knows
the model. Nothing here changes a value other than reading its unit.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from longctx.config.base import Count, Length, schema
from longctx.rope import AnyRule

LayoutName = Literal["zigzag", "contiguous"]
ScheduleKind = Literal["constant", "cosine", "linear", "continue"]


def _named(value: Any) -> Any:
    """`rule=ntk` is short for `rule={name: ntk}`; names may be written with underscores."""
    value = {"name": value} if isinstance(value, str) else value
    if isinstance(value, Mapping) and isinstance(value.get("name"), str):
        return {**value, "name": value["name"].replace("_", "-")}
    return value


RuleField = Annotated[AnyRule, Field(discriminator="name"), BeforeValidator(_named)]


@schema
class LearningRateConfig:
    """A stage's learning rate: linear warm-up to peak, then constant, or down to final by cosine or linear.

    kind `continue`: go on along the schedule of the stage before, which is stretched over both.
    """

    peak: float | None = None
    final: float | None = None
    warmup_steps: int | None = None
    kind: ScheduleKind | None = None


@schema
class AdvanceConfig:
    """Leave a stage early once the loss on the last quarter of the window has flattened; off unless enabled.

    Flat: the mean over the last `steps` steps is less than `min_drop` (relative) below the mean over the
    `steps` before them. Not before `min_share` of the stage's steps are done.
    """

    enabled: bool = False
    steps: int = 20
    min_drop: float = 0.002
    min_share: float = 0.25

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps={self.steps} must be 1 or more")
        if not 0 <= self.min_share <= 1:
            raise ValueError(f"min_share={self.min_share} must lie between 0 and 1")
        if not 0 <= self.min_drop < 1:
            raise ValueError(f"min_drop={self.min_drop} must lie between 0 and 1")


@schema
class StageConfig:
    """One stage. Exactly one of theta and rule, of tokens and steps, of batch and batch_tokens.

    seq_len: tokens per sequence. tokens, steps: how long. batch: sequences per optimizer step; batch_tokens:
    the same in tokens. mix: name of a data mix. Left out: as in the curriculum.
    """

    seq_len: Length
    theta: Count | None = None
    rule: RuleField | None = None
    tokens: Count | None = None
    steps: int | None = None
    batch: int | None = None
    batch_tokens: Count | None = None
    lr: LearningRateConfig = LearningRateConfig()
    mix: str | None = None
    layout: LayoutName | None = None
    advance: AdvanceConfig | None = None


@schema
class MadeForConfig:
    """The rope a curriculum was made for; `longctx theta` begins there when no model is named."""

    head_dim: int
    theta: Count
    window: Length


@schema
class CurriculumConfig:
    """Stages by name in order of length, and what they share.

    rule, lr, mix, layout, advance: for stages that say nothing else. only: the names of the stages to run.
    scratch: the model is new, so that lengths may repeat and lie below its window. theta_file: what
    `longctx theta search=true` wrote; its thetas replace those of the stages it names, whose rule stays.
    made_for: the rope it was made for, which only `longctx theta` without a model looks at.
    """

    stages: dict[str, StageConfig]
    rule: RuleField | None = None
    lr: LearningRateConfig = LearningRateConfig()
    mix: str = "default"
    layout: LayoutName = "zigzag"
    advance: AdvanceConfig = AdvanceConfig()
    only: list[str] | None = None
    scratch: bool = False
    theta_file: str | None = None
    made_for: MadeForConfig | None = None

    def __post_init__(self) -> None:
        if not self.stages:
            raise ValueError("stages is empty; a curriculum needs at least one, such as stages: {s64k: {...}}")
