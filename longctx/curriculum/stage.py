"""A resolved stage: plain numbers, the same on every rank, with its learning rate and the rule for ending it early.

Both rules are pure functions of the step or the losses, so a resumed run computes the same values as before.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class LearningRate:
    """The learning rate of a stage, which may continue the decay that an earlier stage began.

    kind: constant, cosine or linear. offset: steps of the decay before this stage. span: steps of the whole decay.
    """

    peak: float
    final: float
    warmup_steps: int
    kind: str
    offset: int
    span: int

    def at(self, step: int) -> float:
        """The learning rate of the stage's step `step` (0-based).

        The warm-up reaches the peak with its last step. The decay starts at the peak and would reach `final` one step
        after the last (share k / n for step k of n), so every step trains, even if there is only one.
        """
        done = self.offset + step
        if done < self.warmup_steps:
            return self.peak * (done + 1) / self.warmup_steps
        share = min(1.0, (done - self.warmup_steps) / max(1, self.span - self.warmup_steps))
        if self.kind == "cosine":
            return self.final + (self.peak - self.final) * (1 + math.cos(math.pi * share)) / 2
        if self.kind == "linear":
            return self.peak + (self.final - self.peak) * share
        return self.peak


@dataclass(frozen=True)
class Advance:
    """The rule by which a stage may end early; config.curriculum.AdvanceConfig explains it."""

    steps: int
    min_drop: float
    min_share: float

    def flattened(self, losses: Sequence[float], stage_steps: int) -> bool:
        """Whether the stage may end; `losses` has one per step taken, over the last quarter of each sequence."""
        if len(losses) < max(2 * self.steps, math.ceil(self.min_share * stage_steps)):
            return False
        recent = math.fsum(losses[-self.steps :]) / self.steps
        before = math.fsum(losses[-2 * self.steps : -self.steps]) / self.steps
        return recent > before * (1 - self.min_drop)


@dataclass(frozen=True)
class Stage:
    """One stage as training runs it.

    window, start_window: the model's after the stage and before it, in tokens. rope: transformers' rope_parameters.
    tokens: steps * batch * seq_len. batch: sequences per step. advance: None if the stage may not end early. rule: the
    name of the rule that made the rope ("theta": the theta was given).
    """

    name: str
    index: int
    seq_len: int
    window: int
    rope: dict[str, Any]
    theta: float
    tokens: int
    batch: int
    steps: int
    lr: LearningRate
    mix: str
    layout: str
    advance: Advance | None
    start_window: int
    rule: str
