"""A run continued on another number of ranks, another dp x cp, another ZeRO stage or engine is the same run."""

from __future__ import annotations

import itertools
import json
import re
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from longctx.signals import SAVED_AND_REQUEUE
from longctx.train import metrics
from longctx.train.zero import ZeroEngine

from .lives import live, said
from .made import config


def part(world: int, cp: int, zero: int) -> dict[str, Any]:
    """Free keys of one life: ranks, ranks per sequence, engine."""
    name = "deepspeed" if zero else "ddp"
    return {"launch": {"nproc": world, "threads": 1}, "parallel": {"cp": cp}, "engine": {"name": name, "zero": zero}}


def continued(
    run: Path, documents: Path, lives: list[tuple[int, int, int]], stops: list[int],
    engines: list[dict] | None = None, **changes: Any,
) -> None:  # fmt: skip
    """Train `run` to its end in `lives` (world, cp, ZeRO stage), stopped in between during steps `stops`.

    engines: further keys of each life's engine. changes: of the config, in every life.
    """
    for (world, cp, zero), stop, engine in itertools.zip_longest(lives, stops, engines or []):
        free = part(world, cp, zero)
        free["engine"] |= engine or {}
        status = live(config(run, documents, **free, **changes), world, stop_after=stop)
        assert status == (0 if stop is None else SAVED_AND_REQUEUE), (world, cp, zero)
        assert foreign(run, world) == [], (world, cp, zero)
        if stop is not None:
            state = json.loads(next(newest(run).glob("state.json")).read_text())
            assert state["step"] == stop
            assert state["written_by"]["world"] == world
            assert state["written_by"]["ZeRO"] == zero


def foreign(run: Path, world: int) -> list[str]:
    """The lines of the run's last life that a library wrote: all of a silent rank's, and those of the first by form."""
    silent = [line for rank in range(1, world) for line in said(run, rank).splitlines()]
    library = re.compile(r"site-packages|Warning|^\s+return |^\[|^\w\d{4} |\.py:\d+")
    first = [line for line in said(run, 0).splitlines() if library.search(line)]
    return first + [line for line in silent if not line.startswith("longctx: ")]


def newest(run: Path) -> Path:
    return run / json.loads((run / "latest.json").read_text())["checkpoint"]


def same(run: Path, undisturbed: Path) -> bool:
    """Assert that losses agree within 1e-5, no data is skipped or repeated, and weights differ by rounding only."""
    found, wanted = metrics.read(run / "metrics.jsonl"), metrics.read(undisturbed / "metrics.jsonl")
    assert [line["cursor"] for line in found] == [line["cursor"] for line in wanted]
    assert [line["weight"] for line in found] == [line["weight"] for line in wanted]
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5), f"step {ours['step']}"
    ours = load_file(run / "stages/s128/model/model.safetensors")
    for name, weight in load_file(undisturbed / "stages/s128/model/model.safetensors").items():
        # Adam's first steps divide gradients by their own size, so a rounding of the gradient is one of the weight.
        assert torch.allclose(ours[name], weight, rtol=1e-3, atol=2e-4), name
    return True


def test_other_ranks_stages_and_engines(tmp_path: Path, documents: Path, undisturbed: Path) -> None:
    """One run: ring of two under ddp, ZeRO-2 and 1 on dp 2, ZeRO-3 on dp 2 x cp 2, one process; across a hand-off.

    Each life prints the run's own lines only, while it trains, saves and continues.
    """
    run = tmp_path / "run"
    continued(run, documents, [(2, 2, 0), (2, 1, 2), (2, 1, 1), (4, 2, 3), (1, 1, 0)], [1, 3, 4, 6])
    assert same(run, undisturbed)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("second", [(1, 1, 0), (4, 2, 0), (2, 1, 1), (4, 4, 2), (2, 2, 3), (4, 2, 3)])
@pytest.mark.parametrize("first", [(1, 1, 0), (2, 2, 1), (4, 2, 2), (2, 1, 3), (4, 4, 3)])
def test_every_pair(
    tmp_path: Path, documents: Path, undisturbed: Path, first: tuple[int, int, int], second: tuple[int, int, int]
) -> None:
    """From each (world, cp, ZeRO) to each, with the stop inside the first stage."""
    run = tmp_path / "run"
    continued(run, documents, [first, second], [2])
    assert same(run, undisturbed)


@pytest.mark.slow  # test_other_ranks_stages_and_engines crosses the same engines
@pytest.mark.parametrize("zero", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_the_same_ranks_go_on_bit_for_bit_under_zero(tmp_path: Path, documents: Path, zero: int) -> None:
    """Stopped and continued on two ranks, against a run on the same ranks that nobody stopped."""
    where = (2, 2, zero)
    continued(tmp_path / "whole", documents, [where], [])
    continued(tmp_path / "stopped", documents, [where, where], [2])
    losses = [[line["loss"] for line in metrics.read(tmp_path / run / "metrics.jsonl")] for run in ("whole", "stopped")]
    assert losses[0] == losses[1]
    ends = [load_file(tmp_path / run / "stages/s128/model/model.safetensors") for run in ("whole", "stopped")]
    assert all(weight.equal(ends[1][name]) for name, weight in ends[0].items())


def test_hpz_s_second_copy_is_of_the_restored_weights(tmp_path: Path, documents: Path) -> None:
    """The first step after a stop has the loss of the run that nobody stopped; its largest weights have a second copy.

    DeepSpeed keeps parameters of up to 100,000 numbers whole, and gathers larger ones from the copy where it has one.
    """
    init = {"layers": 1, "hidden": 256, "heads": 4, "kv_heads": 2, "ffn": 512, "vocab": 512, "window": 64}
    for name, hpz, stops in (("plain", 1, []), ("copied", 2, [2])):
        run = tmp_path / name
        lives = [(2, 1, 3)] * (len(stops) + 1)
        engines = [{"hpz_partition_size": hpz}] * len(lives)
        continued(run, documents, lives, stops, engines, model={"init": init})
    found, wanted = ([line["loss"] for line in metrics.read(tmp_path / name / "metrics.jsonl")]
                     for name in ("copied", "plain"))  # fmt: skip
    assert found == pytest.approx(wanted, rel=1e-5)


def test_zero_s_count_of_steps_lies_where_its_optimizer_reads_it() -> None:
    """On a GPU the fused kernel takes a pointer to the count, which must not be one of the host's memory."""

    class Ones:
        def read(self, kind: str, name: str, start: int, numel: int) -> torch.Tensor:
            return torch.full((numel,), 3.0)

    flat, engine = torch.nn.Parameter(torch.empty(8, device="meta")), ZeroEngine.__new__(ZeroEngine)
    adam = torch.optim.AdamW([flat])
    for optimizer in (adam, SimpleNamespace(state=defaultdict(dict))):  # torch's, and DeepSpeed's own on the host
        engine.zero = SimpleNamespace(optimizer=optimizer)
        engine._restore_piece(Ones(), "w", 0, 8, flat, 0)  # type: ignore[arg-type]
    assert adam.state[flat]["step"].device == flat.device
    assert engine.zero.optimizer.state[flat]["step"] == 3
    assert isinstance(engine.zero.optimizer.state[flat]["step"], int)
