"""The end of a run on several ranks: one status, whichever rank has it and whichever comes to the end first."""

from __future__ import annotations

import threading
import time

import pytest
import torch.distributed as dist

from longctx.distributed import meeting
from longctx.distributed.placement import Introduction


@pytest.mark.parametrize("noted", [False, True])
@pytest.mark.parametrize(
    ("statuses", "order", "run"),
    [((0, 0), (0, 1), 0), ((0, 1), (0, 1), 1), ((0, 1), (1, 0), 1), ((75, 75), (0, 1), 75), ((75, 1), (0, 1), 1)],
)
def test_a_run_ends_with_the_worst_status_of_its_ranks(
    monkeypatch: pytest.MonkeyPatch, statuses: tuple[int, int], order: tuple[int, int], run: int, noted: bool
) -> None:
    """Ranks are threads. Where the launch script has noted the run's status, every rank leaves with 0."""
    store, both = dist.HashStore(), [Introduction(rank, "a", rank, 2) for rank in range(2)]
    left: dict[int, int] = {}
    told: list[int] = []

    def note(status: int) -> bool:
        told.append(status)
        return noted

    def leave(rank: int) -> None:
        left[rank] = meeting.leave_together(statuses[rank], note)

    threads = []
    for rank in order:
        monkeypatch.setattr(meeting, "_met", meeting.Meeting(store, rank, 2, both))
        threads.append(threading.Thread(target=leave, args=(rank,)))
        threads[-1].start()
        time.sleep(0.1)  # it reads its meeting
    for thread in threads:
        thread.join()
    assert told == [run]
    assert left == ({0: 0, 1: 0} if noted else {0: run, 1: statuses[1]})
