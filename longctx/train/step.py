"""One optimizer step: sum(w * loss) * world / global sum(w) over all micro-batches, exact on any number of ranks.

The loss weights are summed over all micro-batches and ranks before the first backward pass, so that uneven documents,
ranks without labels and accumulation do not change the gradient. The engine averages over ranks, which cancels the
factor `world`. This module accumulates; the engines do not.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from longctx.distributed.ranks import Ranks
from longctx.train.batch import MicroBatch
from longctx.train.engine import Engine
from longctx.train.guards import Guards
from longctx.train.heartbeat import Progress

CHECK_SECONDS = 5.0


class Timer:
    """Seconds of a step's phases: the host's on a CPU, and on a GPU those of events, for which the host never waits."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._seconds: dict[str, float] = {}
        self._events: deque[tuple[str, torch.cuda.Event]] = deque()
        self.start()

    def start(self) -> None:
        """Begin a step and its first phase."""
        self._last = time.perf_counter()
        self._mark("")

    def lap(self, phase: str) -> None:
        """End a phase, which began with the previous one's end."""
        self._mark(phase)
        if self.device.type != "cuda":
            now = time.perf_counter()
            self._seconds[phase] = self._seconds.get(phase, 0.0) + now - self._last
            self._last = now

    def settle(self) -> dict[str, float]:
        """The seconds of the phases that have ended since the last call.

        On a GPU the optimizer may still be at work when the host goes on, so its seconds come with the next step's.
        """
        found, self._seconds = self._seconds, {}
        while len(self._events) > 1 and self._events[1][1].query():
            _, began = self._events.popleft()
            phase, ended = self._events[0]
            if phase:
                found[phase] = found.get(phase, 0.0) + began.elapsed_time(ended) / 1e3
        return found

    def _mark(self, phase: str) -> None:
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._events.append((phase, event))


@dataclass
class StepReport:
    """The result of a step, equal on all ranks except for `seconds` and `wait`.

    loss: the mean nll over `weight`, which a held-out loss can be compared with.
    z_loss: the mean of z lse^2 over `weight`, which the gradient follows too; 0 under optim.z_loss=0.
    tail_loss: as `loss`, over the last quarter of each sequence, where asked for.
    tokens, weight, pairs: summed over all ranks and micro-batches.
    votes: for each question, whether any rank said yes.
    seconds: by phase, of the phases that have ended (see `Timer.settle`).
    wait: seconds that a signal waits at most until the ranks look for one again.
    """

    loss: float
    z_loss: float
    tail_loss: float | None
    grad_norm: float
    tokens: int
    weight: float
    pairs: float
    skipped: bool
    votes: list[bool]
    seconds: dict[str, float]
    wait: float


@dataclass
class Stepper:
    """Takes the steps of one stage.

    cp: ranks that hold one sequence. stop: whether this rank was asked to stop. check_seconds: seconds of computing
    after which the ranks look again, together, whether one of them was.
    """

    engine: Engine
    ranks: Ranks
    guards: Guards
    progress: Progress
    cp: int
    stop: Callable[[], bool] = lambda: False
    check_seconds: float = CHECK_SECONDS
    _pace: float = 0.0  # seconds per micro-batch of the last step

    def take(
        self, batches: Sequence[MicroBatch], lr: float, *, step: int, timer: Timer, votes: Sequence[bool] = ()
    ) -> StepReport | None:
        """Take a step: forward, backward, reduce, guard, optimizer. A collective.

        batches: this rank's micro-batches, equally many on every rank. votes: questions to all ranks (is a save due?),
        which are sent with the first message. Returns None when a rank was asked to stop before the step or between its
        micro-batches; weights, optimizer and random numbers are then as after the previous step. Raises RunFailed when
        the loss or the gradient is not finite; the optimizer is then untouched.
        """
        ranks, engine = self.ranks, self.engine
        pace = self._pace if ranks.first else 0.0  # one rank's clock, so that all look at the same micro-batches
        asked = [float(self.stop()), pace, *map(float, votes)]
        weight, tokens, pairs, tail_weight, stopping, pace, *ballot = ranks.sum([*self._counts(batches), *asked])
        if stopping:
            return None
        every = max(1, math.ceil(self.check_seconds / pace)) if pace > 0 else 1
        random, began = _random_state(ranks.device), time.perf_counter()
        scale = ranks.world / weight if weight > 0 else 0.0
        sums = torch.zeros(3, dtype=torch.float64, device=ranks.device)  # nll, nll of the last quarters, z
        for position, batch in enumerate(batches):
            if position and position % every == 0 and ranks.any(self.stop()):
                engine.discard()
                _restore_random(random, ranks.device)
                return None
            self.progress.at("forward", step)
            batch = batch.to(ranks.device)
            timer.lap("data")
            out = engine.forward(**batch.inputs, per_token=batch.tail is not None)
            sums[0] += out.loss_sum.detach() - out.z_sum
            sums[2] += out.z_sum
            if batch.tail is not None and out.per_token is not None:
                sums[1] += (out.per_token.double() * batch.tail).sum()
            timer.lap("forward")
            self.progress.at("backward", step)
            engine.backward(out.loss_sum * scale, last=position == len(batches) - 1)
            timer.lap("backward")
        self.progress.at("reduce", step)
        # The step's only wait for the device.
        own, own_tail, own_z, norm = torch.cat([sums, engine.grad_norm()[None]]).tolist()
        self._pace = (time.perf_counter() - began) / max(len(batches), 1)
        nll_sum, tail_sum, z_sum = ranks.sum([own, own_tail, own_z])
        mean, z_mean = (nll_sum / weight, z_sum / weight) if weight > 0 else (0.0, 0.0)
        timer.lap("reduce")
        self.guards.check_finite(mean, norm, own, batches, step)
        skipped = self.guards.is_mute(weight, step) or self.guards.is_spike(mean)
        if skipped:
            engine.discard()
        else:
            engine.step(lr, norm)
        timer.lap("optimizer")
        tail = tail_sum / tail_weight if tail_weight > 0 else None
        wait = time.perf_counter() - began - self._pace * max(0, len(batches) - every)
        votes = [vote > 0 for vote in ballot]
        seconds = timer.settle()
        return StepReport(mean, z_mean, tail, norm, int(tokens), weight, pairs, skipped, votes, seconds, wait)

    def _counts(self, batches: Sequence[MicroBatch]) -> list[float]:
        weight = sum(batch.weight for batch in batches)
        tokens = float(sum(batch.tokens for batch in batches))
        pairs = sum(batch.pairs for batch in batches) / self.cp  # each of the cp ranks counts the whole rows
        tail = sum(float(batch.tail.sum(dtype=torch.float64)) for batch in batches if batch.tail is not None)
        return [weight, tokens, pairs, tail]


def _random_state(device: torch.device) -> list[torch.Tensor]:
    on_device = [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []
    return [torch.get_rng_state(), *on_device]


def _restore_random(states: list[torch.Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    for state in states[1:]:
        torch.cuda.set_rng_state(state, device)
