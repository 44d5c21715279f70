"""Finds the rank that stalls: a thread of every rank publishes the phase of its main thread, and rank 0 compares.

When no rank makes progress for `limit` seconds, all ranks but the stalled one wait in a collective. The stalled rank is
the one whose thread no longer reports, or else the one that is furthest behind. It is named, and the run ends instead
of hanging.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch.distributed as dist

# Phases that may last longer than any limit (tokenizing, loading, an export, an adapter): in these only a process that
# stops reporting counts as stalled.
PATIENT = ("start", "hand-off")
SILENT = "its process no longer answers"


@dataclass(frozen=True)
class Beat:
    """A rank's report.

    moves: phases passed so far. still: seconds since the last one began. age: seconds since the report came.
    """

    rank: int
    moves: int
    step: int
    phase: str
    still: float
    age: float


class Progress:
    """The current phase, written by the main thread and read by the watcher; `at` only sets attributes."""

    def __init__(self) -> None:
        self.moves, self.step, self.phase, self.since = 0, 0, "start", time.monotonic()

    def at(self, phase: str, step: int) -> None:
        self.moves, self.step, self.phase, self.since = self.moves + 1, step, phase, time.monotonic()


class Watchdog:
    """The watching thread of a rank; limit: seconds without progress on any rank.

    Rank 0 looks for stalled ranks, and rank 1 looks at rank 0. The store of the reports is usually in rank 0's process,
    so rank 1 also takes a store that does not answer for a rank 0 that does not; calls of the store have no timeout.
    """

    def __init__(
        self,
        progress: Progress,
        rank: int,
        world: int,
        limit: float,
        fail: Callable[[str], None] | None = None,
    ):
        self.progress, self.rank, self.world, self.limit = progress, rank, world, limit
        self._fail = fail or _end_run
        self._stop = threading.Event()
        self._interval = min(max(limit / 10, 0.2), 15.0)
        self._answered = time.monotonic()
        self._thread: threading.Thread | None = None
        if world > 1 and limit > 0:
            self._store = cast(Any, dist.distributed_c10d._get_default_store()).clone()
            self._thread = threading.Thread(target=self._run, name="watcher", daemon=True)
            self._thread.start()
            if rank == 1:
                threading.Thread(target=self._watch_store, name="store watcher", daemon=True).start()

    def close(self) -> None:
        self._stop.set()
        if self._thread:
            self._thread.join(timeout=5)

    def _run(self) -> None:
        seen: dict[int, tuple[str, float]] = {}
        while not self._stop.wait(self._interval):
            now = self._answered = time.monotonic()
            at = self.progress
            own = f"{at.moves}|{at.step}|{at.phase}|{now - at.since:.1f}|{now}"
            try:
                self._store.set(f"beat/{self.rank}", own)
                if self.rank < 2 and (found := self._judge(seen)) and (found.culprit == 0) == (self.rank == 1):
                    self._fail(found.words)
                    return
            except (RuntimeError, OSError):  # the store went away: the run is ending
                self._stop.set()

    def _watch_store(self) -> None:
        """End the run when the store has not answered for `limit` seconds in which this rank made no progress."""
        while not self._stop.wait(self._interval):
            at, now = self.progress, time.monotonic()
            if min(now - self._answered, now - at.since) > self.limit:
                self._fail(_words(0, at.step, SILENT, [at.phase], self.limit))
                return

    def _judge(self, seen: dict[int, tuple[str, float]]) -> Verdict | None:
        beats = []
        for rank in range(self.world):
            key = f"beat/{rank}"
            if not self._store.check([key]):
                return None
            text = self._store.get(key).decode()
            now = time.monotonic()
            if rank not in seen or seen[rank][0] != text:
                seen[rank] = (text, now)
            moves, step, phase, still, _ = text.split("|")
            age = now - seen[rank][1]
            beats.append(Beat(rank, int(moves), int(step), phase, float(still) + age, age))
        return verdict(beats, self.limit)


class Verdict(NamedTuple):
    culprit: int
    words: str


def verdict(beats: list[Beat], limit: float) -> Verdict | None:
    """The rank that stalls, and why; None while some rank makes progress or is in a phase that may take long."""
    if min(beat.still for beat in beats) < limit:
        return None
    silent = [beat for beat in beats if beat.age > limit / 2]
    culprit = max(silent, key=lambda beat: beat.age) if silent else min(beats, key=lambda beat: beat.moves)
    if not silent and culprit.phase in PATIENT:
        return None
    why = SILENT if silent else f"it has been in {culprit.phase!r} for {culprit.still:.0f} s"
    others = sorted({beat.phase for beat in beats if beat.rank != culprit.rank})
    return Verdict(culprit.rank, _words(culprit.rank, culprit.step, why, others, limit))


def _words(rank: int, step: int, why: str, others: list[str], limit: float) -> str:
    return (
        f"rank {rank} stalls at step {step}: {why}, while the others wait in {', '.join(others)} "
        f"(guards.stall_seconds={limit:g}). The last checkpoint is intact; run the same command to continue"
    )


def _end_run(text: str) -> None:
    print(f"longctx: {text}", file=sys.stderr, flush=True)
    os._exit(1)
