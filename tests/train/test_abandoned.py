"""A step that a signal ends between its micro-batches leaves no trace in weights, moments and later steps."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from longctx.config.model import MemoryConfig
from longctx.config.train import EngineConfig, GuardsConfig, OptimConfig
from longctx.decide import Shares
from longctx.distributed.ranks import Ranks
from longctx.model import LossModel
from longctx.train import engine as engines
from longctx.train.batch import micro_batch
from longctx.train.guards import Guards
from longctx.train.heartbeat import Progress
from longctx.train.open_stage import open_context_parallel
from longctx.train.step import Stepper, Timer
from tests.dist.ranks import run_ranks

from .made import MadeData
from .parity import SEQ, Case, flat, made_model

MICRO_BATCHES = 3


@dataclass(frozen=True)
class Two:
    """Two steps under a ZeRO stage (0: ddp); abandoned: between them a third, left after its first micro-batch.

    offload: the optimizer's states, and the sums of gradients, are in host memory.
    """

    zero: int
    offload: bool
    abandoned: bool
    out: Path

    def file(self, rank: int) -> Path:
        return self.out / f"{self.zero} {self.abandoned} {rank}"


def held(engine: engines.Engine) -> dict[str, torch.Tensor]:
    return {f"{part.kind} {part.name} {part.start}": part.data.detach().clone() for part in engine.fragments()}


def two_steps(rank: int, world: int, case: Two) -> None:
    ranks = Ranks(rank, world, rank, world, torch.device("cpu"))
    data = MadeData(SEQ, 3 * MICRO_BATCHES * world, seed=3)
    share = Shares(world, rank, MICRO_BATCHES, 1)
    context, _ = open_context_parallel(flat(1, ranks.world), ranks, None)
    model = LossModel(made_model(Case(cp=1), "float32", "longctx"), MemoryConfig())
    engine_of: dict[str, Any] = {"name": "deepspeed" if case.zero else "ddp", "zero": case.zero}
    config = EngineConfig(**engine_of, device="cpu", offload_optimizer=case.offload)
    engine = engines.build(config, OptimConfig(), model, ranks)
    looks: list[int] = []

    def stop() -> bool:
        """Signal rank 1 only, when the ranks look for signals the second time."""
        looks.append(len(looks))
        return rank == 1 and len(looks) == 2

    def take(position: int, *, asked: bool = False) -> bool:
        stepper = Stepper(engine, ranks, guards, Progress(), 1, stop if asked else lambda: False)
        window = [
            micro_batch(data, own, context, "zigzag") for own in share.sequences(position * MICRO_BATCHES * world)
        ]
        return stepper.take(window, 1e-2, step=position, timer=Timer(ranks.device)) is not None

    guards = Guards(GuardsConfig(), Path("."), ranks, [])
    assert take(0)
    if case.abandoned:
        before, random = held(engine), torch.get_rng_state()
        assert not take(2, asked=True)
        assert len(looks) == 2, "one look before the first micro-batch, one after it"
        after = held(engine)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)
        assert torch.equal(random, torch.get_rng_state())
    assert take(1)
    torch.save(held(engine), case.file(rank))
    engine.close()
    context.close()


@pytest.mark.parametrize(
    ("zero", "offload"),
    [
        (0, False), pytest.param(1, False, marks=pytest.mark.slow), (2, False), (2, True), (3, False),
        pytest.param(3, True, marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_an_abandoned_step_never_happened(tmp_path: Path, zero: int, offload: bool) -> None:
    cases = [Two(zero, offload, abandoned, tmp_path) for abandoned in (False, True)]
    for case in cases:  # a process each: DeepSpeed's state is the process's
        failures = run_ranks(2, two_steps, [case], tmp_path / f"store{case.abandoned}")
        assert not failures, failures[case][0]
    for rank in range(2):
        plain, disturbed = (torch.load(case.file(rank)) for case in cases)
        assert plain.keys() == disturbed.keys()
        assert all(torch.equal(plain[name], disturbed[name]) for name in plain), f"rank {rank}"


def test_short_steps_are_not_looked_into(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks look for a signal before each step, and within a step only after check_seconds of work."""
    ranks = Ranks(0, 1, 0, 1, torch.device("cpu"))
    asked: list[float] = []
    monkeypatch.setattr(Ranks, "any", lambda ranks, flag: bool(asked.append(1.0)))
    data = MadeData(SEQ, MICRO_BATCHES, seed=3)
    context, _ = open_context_parallel(flat(1, ranks.world), ranks, None)
    model = LossModel(made_model(Case(cp=1), "float32", "longctx"), MemoryConfig())
    engine = engines.build(EngineConfig(name="ddp", device="cpu"), OptimConfig(), model, ranks)
    window = [micro_batch(data, [index], context, "zigzag") for index in range(MICRO_BATCHES)]
    guards = Guards(GuardsConfig(), Path("."), ranks, [])
    stepper = Stepper(engine, ranks, guards, Progress(), 1, check_seconds=1e6)
    for found in (MICRO_BATCHES - 1, 0):  # the first step knows no pace yet
        asked.clear()
        assert stepper.take(window, 0.0, step=0, timer=Timer(ranks.device)) is not None
        assert len(asked) == found
    stepper.check_seconds = 0.0
    asked.clear()
    stepper.take(window, 0.0, step=2, timer=Timer(ranks.device))
    assert len(asked) == MICRO_BATCHES - 1
