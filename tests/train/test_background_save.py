"""Saves in the background: the same bytes as other saves, at most one at a time, and no loss when one is cut off."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from longctx.host_memory import free_memory, host_memory
from longctx.model.host import HostMemory
from longctx.run.training import train_run
from longctx.train import fragments, snapshot
from longctx.train.checkpoint import Checkpoints, State
from longctx.train.fragments import Fragment

from .made import config
from .test_checkpoint import ALONE, TwoTensors


def checkpoints(run: Path, background: bool | str = True) -> Checkpoints:
    return Checkpoints(run, ALONE, keep=9, spare_gib=0.0, background=background)  # type: ignore[arg-type]


def steps_saved(run: Path) -> list[str]:
    return sorted(path.name for path in run.glob("stages/*/checkpoints/*"))


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Writing begins once the event is set."""
    event, write = threading.Event(), fragments.write

    def waiting(*arguments: object) -> object:
        assert event.wait(60)
        return write(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(fragments, "write", waiting)
    return event


def test_a_save_holds_what_was_there_when_it_began(tmp_path: Path, gate: threading.Event) -> None:
    engine, state, kept = TwoTensors(1.0), State(step=1, recent_losses=[1.0]), checkpoints(tmp_path)
    assert kept.start(engine, state, "s64") is None  # type: ignore[arg-type]
    engine.tensors["a"].fill_(2.0)  # the next step
    state.step, state.recent_losses = 2, [1.0, 2.0]
    assert (kept.pending, kept.writing, steps_saved(tmp_path)) == (True, True, [f".step00000001.partial-{os.getpid()}"])
    gate.set()
    assert kept.settle() == 1
    assert (kept.pending, kept.settle()) == (False, None)
    found = checkpoints(tmp_path).load(other := TwoTensors())  # type: ignore[arg-type]
    assert found is not None
    assert (found.step, found.recent_losses) == (1, [1.0])
    assert other.tensors["a"].eq(1.0).all()


def test_one_save_is_in_flight_and_its_copies_are_not_overwritten(tmp_path: Path, gate: threading.Event) -> None:
    kept = checkpoints(tmp_path)
    assert kept.start(TwoTensors(1.0), State(step=1), "s64") is None  # type: ignore[arg-type]
    threading.Timer(0.2, gate.set).start()
    assert kept.start(TwoTensors(2.0), State(step=2), "s64") is None  # type: ignore[arg-type]
    assert steps_saved(tmp_path)[-1] == "step00000001"  # settled before the second was copied
    assert kept.save(TwoTensors(3.0), State(step=3), "s64") is not None  # type: ignore[arg-type]
    assert steps_saved(tmp_path) == [f"step0000000{step}" for step in (1, 2, 3)]
    for step in (3, 2, 1):
        found = checkpoints(tmp_path).load(other := TwoTensors())  # type: ignore[arg-type]
        assert found is not None
        assert found.step == step
        assert other.tensors["b"].eq(float(step)).all()
        (tmp_path / f"stages/s64/checkpoints/step0000000{step}/manifest.json").unlink()


def test_a_write_that_fails_is_said_when_it_is_settled_and_leaves_the_last(tmp_path, monkeypatch, capsys) -> None:
    kept = checkpoints(tmp_path)
    assert kept.save(TwoTensors(1.0), State(step=1), "s64") is not None  # type: ignore[arg-type]

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(fragments, "write", full)
    assert kept.start(TwoTensors(2.0), State(step=2), "s64") is None  # type: ignore[arg-type]
    assert kept.settle() is None
    assert "checkpoint at step 2 failed, the previous one is intact: rank 0: rank00000" in " ".join(
        capsys.readouterr().err.split()
    )
    assert steps_saved(tmp_path) == ["step00000001"]


def test_a_save_that_is_abandoned_leaves_nothing(tmp_path: Path, gate: threading.Event) -> None:
    kept = checkpoints(tmp_path)
    kept.start(TwoTensors(1.0), State(step=1), "s64")  # type: ignore[arg-type]
    gate.set()
    kept.abandon()
    assert (kept.pending, steps_saved(tmp_path)) == (False, [])


@pytest.mark.parametrize(("free", "at_once"), [(1000.0, True), (1e9, False)])
def test_auto_writes_at_once_where_memory_for_copies_lacks(tmp_path, monkeypatch, free: float, at_once: bool) -> None:
    monkeypatch.setattr(snapshot, "free_memory", lambda: free)
    large = TwoTensors()
    large.tensors["a"] = torch.zeros(100, 3)  # 1,200 bytes and 28: more than half of 1,000
    kept = checkpoints(tmp_path, "auto")
    assert (kept.start(large, State(step=1), "s64") is not None) is at_once  # type: ignore[arg-type]
    assert kept.pending is not at_once
    kept.settle()
    assert steps_saved(tmp_path) == ["step00000001"]


def test_a_host_without_memory_for_the_copy_saves_at_once(tmp_path, monkeypatch, capsys) -> None:
    """A limit of locked pages, say, of which the count of free memory knows nothing: the run must not end there."""

    def refused(*_: object) -> None:
        raise MemoryError("CUDA cannot lock 1,228 bytes of host memory (error 2; ulimit -l)")

    kept = checkpoints(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(HostMemory, "zeros", refused)
        assert kept.start(TwoTensors(1.0), State(step=1), "s64") is not None  # type: ignore[arg-type]
    assert "saves wait for the disk from here on: no copy in host memory (CUDA cannot lock" in " ".join(
        capsys.readouterr().err.split()
    )
    assert kept.start(TwoTensors(2.0), State(step=2), "s64") is not None  # type: ignore[arg-type]
    assert steps_saved(tmp_path) == ["step00000001", "step00000002"]


def test_copies_that_no_memory_is_left_for_can_be_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The buffer of another shape has been given back before the new one is asked for."""
    copies = snapshot.HostCopies(torch.device("cpu"))
    copies.take([Fragment("weight", "w", 0, torch.ones(4)), Fragment("weight", "x", 0, torch.ones(4))])

    def refused(*_: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patched:
        patched.setattr(HostMemory, "zeros", refused)
        with pytest.raises(MemoryError):
            copies.take([Fragment("weight", "w", 0, torch.ones(8))])
    copies.free()
    assert copies.take([Fragment("weight", "w", 0, torch.ones(8))])[0].data.sum() == 8


def test_free_memory_is_this_machine_s() -> None:
    assert 2**20 < free_memory() < host_memory()


def hashes(run: Path) -> dict[str, object]:
    found = {}
    for file in run.glob("stages/*/checkpoints/*/manifest.json"):
        manifest = json.loads(file.read_text())
        found[file.parent.name] = {name: entry["sha256"] for name, entry in manifest["files"].items()}
    return found


def test_a_run_saves_the_same_bytes_either_way(tmp_path: Path, documents: Path) -> None:
    for name, background in (("at once", False), ("in the background", True)):
        wanted = {"background": background, "keep": 9, "every_steps": 1}
        assert train_run(config(tmp_path / name, documents, checkpoint=wanted)) == 0
    assert hashes(tmp_path / "at once") == hashes(tmp_path / "in the background")
    assert len(hashes(tmp_path / "at once")) == 9
    rows = [json.loads(line) for line in (tmp_path / "in the background/metrics.jsonl").read_text().splitlines()]
    assert [row["save_seconds"] > 0 for row in rows if row.get("stage_step", 1) > 1 and "loss" in row] == [True] * 7


class Large:
    """An engine's fragments: a model of 200 MB in float32 with its two moments."""

    def __init__(self) -> None:
        self.tensors = {f"layer{n}": torch.ones(5 * 10**6) for n in range(10)}

    def shapes(self) -> dict[str, list[int]]:
        return {name: list(tensor.shape) for name, tensor in self.tensors.items()}

    def fragments(self) -> Iterator[Fragment]:
        for name, tensor in self.tensors.items():
            for kind in ("weight", "exp_avg", "exp_avg_sq"):
                yield Fragment(kind, name, 0, tensor)  # type: ignore[arg-type]


def held_up(run: Path, background: bool, saves: int = 3) -> list[float]:
    """Seconds for which each save stops the caller, publishing included."""
    kept, engine, found = Checkpoints(run, ALONE, keep=1, spare_gib=0.0, background=background), Large(), []
    for step in range(saves):
        began = time.monotonic()
        kept.start(engine, State(step=step), "s64")  # type: ignore[arg-type]
        begun = time.monotonic() - began
        while kept.writing:
            time.sleep(0.05)  # training goes on
        began = time.monotonic()
        kept.settle()
        found.append(begun + time.monotonic() - began)
    return found


@pytest.mark.slow
def test_training_stops_for_a_tenth_of_a_save_s_time(tmp_path: Path) -> None:
    """Prints both; the first save in the background also allocates the copies' memory."""
    at_once, behind = held_up(tmp_path / "a", False), held_up(tmp_path / "b", True)
    print(f"a save stops training for {at_once} s at once, {behind} s in the background")
    assert min(behind[1:]) < 0.3 * min(at_once)
