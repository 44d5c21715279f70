"""What a resolved stage is: numbers only, the same on every rank, and the two rules that run inside it.

The learning rate at a step and the rule for leaving a stage early are pure functions here, so that a resumed
run and the planner ask the same question and get the same answer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class LearningRate:
    """Peak and final rate, warm-up in steps, kind; offset and span place the stage on a schedule it
    continues.

    offset: steps of that schedule done before this stage. span: its steps altogether.
    """

    peak: float
    final: float
    warmup_steps: int
    kind: str
    offset: int
    span: int

    def at(self, step: int) -> float:
        """The rate of the stage's optimizer step `step` (0-based).

        Warm-up reaches the peak with its last step. The decay starts at the peak and would reach `final` one step
        after the schedule's last (share k / n for step k of n), so that every step, a single one too, trains.
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
    """When a stage may end early; see config.curriculum.AdvanceConfig for the rule."""

    steps: int
    min_drop: float
    min_share: float

    def flattened(self, losses: Sequence[float], stage_steps: int) -> bool:
        """Whether the stage may end; losses: one per step, on the last quarter of the window."""
        if len(losses) < max(2 * self.steps, math.ceil(self.min_share * stage_steps)):
            return False
        recent = math.fsum(losses[-self.steps :]) / self.steps
        before = math.fsum(losses[-2 * self.steps : -self.steps]) / self.steps
        return recent > before * (1 - self.min_drop)


@dataclass(frozen=True)
class Stage:
    """A stage as it will run. rope: transformers' rope_parameters; window before it: `start_window` tokens.

    tokens: whole batches, steps * batch * seq_len. batch: sequences per optimizer step. advance: None unless
    on. rule: the rule that made the rope ("theta": chosen outright).
    """

    name: str
    index: int
    seq_len: int
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
