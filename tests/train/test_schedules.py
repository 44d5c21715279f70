"""Training on every hierarchical schedule, with a contiguous layout, offload and a stage that ends early."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from longctx.report import page
from longctx.run.training import train_run
from longctx.signals import SAVED_AND_REQUEUE
from longctx.train import loop, metrics
from longctx.train.checkpoint import State
from longctx.train.guards import Guards
from longctx.train.train import resolve_stages

from .lives import live
from .made import config
from .test_run import losses, stop_after
from .test_worlds import same

FLAT_AT_ONCE = {"enabled": True, "steps": 2, "min_drop": 0.9, "min_share": 0.25}  # flat unless the loss falls by 90 %


def curriculum(**first: Any) -> dict[str, Any]:
    return {
        "stages": {
            "s64": {"seq_len": 64, "theta": 10000, "steps": 5, "batch": 4, **first},
            "s128": {"seq_len": 128, "theta": 40000, "steps": 4, "batch": 2, "layout": "contiguous"},
        }
    }


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, documents: Path) -> Path:
    """The run of one process; its first stage ends after four steps of five."""
    run = tmp_path_factory.mktemp("alone") / "run"
    assert train_run(config(run, documents, curriculum=curriculum(advance=FLAT_AT_ONCE))) == 0
    return run


def test_a_stage_ends_early_and_the_next_one_is_trained_whole(alone: Path) -> None:
    lines = metrics.read(alone / "metrics.jsonl")
    assert [line["stage"] for line in lines] == ["s64"] * 4 + ["s128"] * 4
    assert [line["cursor"] for line in lines] == [4, 8, 12, 16, 2, 4, 6, 8]
    marks = [json.loads((alone / f"stages/{name}/finished.json").read_text()) for name in ("s64", "s128")]
    assert [(mark["steps"], mark["planned_steps"]) for mark in marks] == [(4, 5), (4, 4)]
    assert [page._steps(mark) for mark in marks] == ["4 of 5", "4"]


def test_the_last_line_of_a_stage_says_that_it_ends_early(tmp_path: Path) -> None:
    stages = resolve_stages(config(tmp_path / "run", tmp_path, curriculum=curriculum(advance=FLAT_AT_ONCE)))
    words = loop._early_words(State(stage_step=4), stages[0])
    assert words == (
        ", left early after 4 of 5 steps (advance: the loss on the last quarter of the sequences fell by less than "
        "90 % in 2 steps)"
    )
    assert not loop._early_words(State(stage_step=5), stages[0])
    assert not loop._early_words(State(stage_step=3), stages[1])


@pytest.mark.parametrize("steps", [3, 4])
def test_a_run_stopped_before_a_stage_ends_early_ends_it_at_the_same_step(
    tmp_path: Path, documents: Path, alone: Path, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    """Stopped after three of the four losses that are compared, and in the step that ends the stage."""
    made = config(tmp_path / "run", documents, curriculum=curriculum(advance=FLAT_AT_ONCE))
    with monkeypatch.context() as patched:
        stop_after(patched, steps)
        assert train_run(made) == SAVED_AND_REQUEUE
    assert train_run(made) == 0
    assert losses(tmp_path / "run") == losses(alone)


def test_a_skipped_step_does_not_count_where_the_loss_is_flat(
    tmp_path: Path, documents: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The third step is skipped and the run stops there; the fifth has the fourth loss that is compared."""
    checked: list[float] = []

    def third_is_a_spike(guards: Guards, loss: float) -> bool:
        checked.append(loss)
        return len(checked) == 3

    monkeypatch.setattr(Guards, "is_spike", third_is_a_spike)
    made = config(tmp_path / "run", documents, curriculum=curriculum(steps=6, advance=FLAT_AT_ONCE))
    with monkeypatch.context() as patched:
        stop_after(patched, 3)
        assert train_run(made) == SAVED_AND_REQUEUE
    assert train_run(made) == 0
    lines = metrics.read(tmp_path / "run" / "metrics.jsonl")
    assert [line["stage"] for line in lines] == ["s64"] * 5 + ["s128"] * 4
    assert [line["stage_step"] for line in lines if line["skipped"]] == [3]


SCHEDULES = [
    ({"schedule": "double_ring", "nodes": 2}, 2),
    ({"schedule": "allgather_ring", "nodes": 2}, 6),
    ({"schedule": "ulysses_ring", "ulysses": 2}, None),
]


def test_each_schedule_trains_what_one_process_does(tmp_path: Path, documents: Path, alone: Path) -> None:
    """One run on four ranks: stopped within each stage and continued on another schedule; activations offloaded."""
    run = tmp_path / "run"
    for parallel, stop in SCHEDULES:
        made = config(
            run, documents, curriculum=curriculum(advance=FLAT_AT_ONCE), launch={"nproc": 4, "threads": 1},
            parallel={"cp": 4, **parallel}, model={"memory": {"offload_activations": True}},
        )  # fmt: skip
        assert live(made, 4, stop_after=stop) == (SAVED_AND_REQUEUE if stop else 0), parallel
        steps = (run / "life3.out").read_text().splitlines()
        assert {line.split()[-1] for line in steps} == {parallel["schedule"]}
    assert same(run, alone)
    assert {(line["dp"], line["cp"]) for line in metrics.read(run / "metrics.jsonl")} == {(1, 4)}
