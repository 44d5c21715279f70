"""One optimizer step, exact whatever the ranks: sum(w * loss) * world / global sum(w) over the whole window.

The weights are counted once per sequence and summed over all ranks before the first backward, so that neither
uneven documents, nor ranks without labels, nor accumulation change the gradient. The engine averages over
ranks, which cancels the factor `world`. Accumulation is owned here, not by an engine.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from longctx.distributed.ranks import Ranks
from longctx.train.batch import MicroBatch
from longctx.train.engine import Engine
from longctx.train.guards import Guards
from longctx.train.heartbeat import Progress


@dataclass
class Timer:
    """Seconds by phase. On a GPU the phases are those of the host unless `device` is synchronised."""

    device: torch.device
    seconds: dict[str, float] = field(default_factory=dict)
    _last: float = field(default_factory=time.perf_counter)

    def lap(self, phase: str) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._last
        self._last = now


@dataclass
class StepReport:
    """What a step did, equal on all ranks but for `seconds`.

    tokens, weight, pairs: over all ranks and micro-batches; loss: mean over `weight`; tail_loss: the same
    over the last quarter of each sequence, where asked for. votes: per question, whether any rank said yes.
    """

    loss: float
    tail_loss: float | None
    grad_norm: float
    tokens: int
    weight: float
    pairs: float
    skipped: bool
    votes: list[bool]
    seconds: dict[str, float]


@dataclass
class Stepper:
    """What does not change from step to step of a stage. cp: ranks that hold one sequence."""

    engine: Engine
    ranks: Ranks
    guards: Guards
    progress: Progress
    cp: int

    def take(
        self, window: Sequence[MicroBatch], lr: float, *, step: int, timer: Timer, votes: Sequence[bool] = ()
    ) -> StepReport:
        """Forward, backward, reduce, guard, optimizer. window: this rank's micro-batches, as many on every
        rank.

        votes: questions (a signal came, a save is due) that ride on the count's message. Raises RunFailed
        when the loss or the gradient is not finite; the optimizer is then untouched.
        """
        ranks, engine = self.ranks, self.engine
        weight, tokens, pairs, tail_weight, *ballot = ranks.sum([*self._counts(window), *map(float, votes)])
        scale = ranks.world / weight if weight > 0 else 0.0
        sums = torch.zeros(2, dtype=torch.float64, device=ranks.device)  # loss, loss of the last quarters
        for position, batch in enumerate(window):
            self.progress.at("forward", step)
            batch = batch.to(ranks.device)
            timer.lap("data")
            out = engine.forward(**batch.inputs, per_token=batch.tail is not None)
            sums[0] += out.loss_sum.detach()
            if batch.tail is not None and out.per_token is not None:
                sums[1] += (out.per_token.double() * batch.tail).sum()
            timer.lap("forward")
            self.progress.at("backward", step)
            engine.backward(out.loss_sum * scale, last=position == len(window) - 1)
            timer.lap("backward")
        self.progress.at("reduce", step)
        norm = engine.grad_norm()
        own = sums.tolist()
        loss_sum, tail_sum = ranks.sum(own)
        mean = loss_sum / weight if weight > 0 else 0.0
        timer.lap("reduce")
        self.guards.check_finite(mean, norm, own[0], window, step)
        skipped = self.guards.is_mute(weight, step) or self.guards.is_spike(mean)
        if skipped:
            engine.discard()
        else:
            engine.step(lr)
        timer.lap("optimizer")
        tail = tail_sum / tail_weight if tail_weight > 0 else None
        return StepReport(mean, tail, norm, int(tokens), weight, pairs, skipped, [v > 0 for v in ballot], timer.seconds)

    def _counts(self, window: Sequence[MicroBatch]) -> list[float]:
        weight = sum(batch.weight for batch in window)
        tokens = float(sum(batch.tokens for batch in window))
        pairs = sum(batch.pairs for batch in window) / self.cp  # each of the cp ranks counts the whole rows
        tail = sum(float(batch.tail.sum(dtype=torch.float64)) for batch in window if batch.tail is not None)
        return [weight, tokens, pairs, tail]
