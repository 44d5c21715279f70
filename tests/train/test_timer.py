"""The seconds of a step's phases: the host's on a CPU; the device's on a GPU, without waiting for it."""

from __future__ import annotations

import gc
import time

import pytest
import torch

from longctx import collector
from longctx.train.step import Timer


def test_phases_add_up_and_repeat():
    timer = Timer(torch.device("cpu"))
    for _ in range(2):
        time.sleep(0.01)
        timer.lap("forward")
        timer.lap("backward")
    seconds = timer.settle()
    assert list(seconds) == ["forward", "backward"]
    assert seconds["forward"] >= 0.02 > seconds["backward"]
    timer.start()
    timer.lap("data")
    assert list(timer.settle()) == ["data"]


class Clock:
    """Stands in for torch.cuda.Event: each takes its place in a list, in milliseconds. done: events that have ended."""

    recorded: list[Clock] = []  # noqa: RUF012
    done = 0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        Clock.recorded.append(self)

    def query(self) -> bool:
        return Clock.recorded.index(self) < Clock.done

    def elapsed_time(self, end: Clock) -> float:
        first, last = (Clock.recorded.index(event) for event in (self, end))
        assert last == first + 1
        return 1000.0 * last


def test_phases_that_a_gpu_has_not_finished_come_with_the_next_step(monkeypatch: pytest.MonkeyPatch):
    """An event that is waited for would need `synchronize`, which Clock lacks."""
    monkeypatch.setattr(torch.cuda, "Event", Clock)
    timer = Timer(torch.device("cuda"))
    timer.start()  # as the loop does; what lies between two steps is no phase
    for phase in ("forward", "backward", "forward", "optimizer"):
        timer.lap(phase)
    Clock.done = 5  # two starts and three phases
    assert timer.settle() == {"forward": 2.0 + 4.0, "backward": 3.0}
    assert timer.settle() == {}
    timer.start()
    timer.lap("forward")
    Clock.done = 8
    assert timer.settle() == {"optimizer": 5.0, "forward": 7.0}
    assert len(timer._events) == 1


def test_the_collector_is_slow_only_while_libraries_are_imported(monkeypatch: pytest.MonkeyPatch):
    before, frozen = gc.get_threshold(), []
    monkeypatch.setattr(gc, "freeze", lambda: frozen.append(True))  # the other tests' objects stay collectable
    collector.end_imports()
    assert (gc.get_threshold(), frozen) == (before, [])  # training called from a program leaves it alone
    collector.begin_imports()
    assert gc.get_threshold()[0] > before[0]
    collector.end_imports()
    assert (gc.get_threshold(), frozen) == (before, [True])
