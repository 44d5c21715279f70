"""The seconds of a step's phases: the host's on a CPU, the device's on a GPU, where only `settle` waits."""

from __future__ import annotations

import time

import pytest
import torch

from longctx.train.step import Timer


def test_phases_add_up_and_repeat():
    timer = Timer(torch.device("cpu"))
    for _ in range(2):
        time.sleep(0.01)
        timer.lap("forward")
        timer.lap("backward")
    timer.settle()
    assert list(timer.seconds) == ["forward", "backward"]
    assert timer.seconds["forward"] >= 0.02 > timer.seconds["backward"]


class Clock:
    """Stands in for torch.cuda.Event: each takes its place in a list, in milliseconds."""

    recorded: list[Clock] = []  # noqa: RUF012
    waited = 0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        Clock.recorded.append(self)

    def synchronize(self) -> None:
        assert self is Clock.recorded[-1], "only the last event is waited for"
        Clock.waited += 1

    def elapsed_time(self, end: Clock) -> float:
        first, last = (Clock.recorded.index(event) for event in (self, end))
        assert last == first + 1
        return 1000.0 * last


def test_a_gpu_is_waited_for_once(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "Event", Clock)
    timer = Timer(torch.device("cuda"))
    for phase in ("forward", "backward", "forward"):
        timer.lap(phase)
    assert Clock.waited == 0
    timer.settle()
    assert Clock.waited == 1
    assert timer.seconds == {"forward": 4.0, "backward": 2.0}  # the first and third interval, and the second
