"""SIGTERM, SIGUSR1 and SIGHUP ask a run to finish its step, save and leave with status 75 (to be requeued).

SIGHUP is a terminal that was closed: what is said from there on goes nowhere, or the first word would end the
run. SIGUSR1 is Slurm's usual grace signal (`--signal=USR1@120`). The handler only sets a flag; the loop looks
at it between steps, on all ranks together. Ctrl-C leaves at once: the last checkpoint is what remains.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SAVED_AND_REQUEUE = 75
INTERRUPTED = 130


class StopRequest:
    """Install on the main thread; `asked` turns true when a signal has come."""

    def __init__(self) -> None:
        self.name: str | None = None
        self._before = {number: signal.signal(number, self._note) for number in asking()}

    @property
    def asked(self) -> bool:
        return self.name is not None

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.name = signal.Signals(number).name
        if number == signal.SIGHUP:
            go_silent()

    def close(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


@contextmanager
def leaving_on_request() -> Iterator[None]:
    """Where pieces of work are published when they are done, and skipped when they stand: leave at once with 75."""

    def leave(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGHUP:
            go_silent()
        note_requeue()
        raise SystemExit(SAVED_AND_REQUEUE)

    before = {number: signal.signal(number, leave) for number in asking()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def note_requeue() -> None:
    """Tell the script that started this (launch/): torchrun and srun do not hand on the status of a rank."""
    if path := os.environ.get("LONGCTX_REQUEUE"):
        with open(path, "w") as file:
            file.write(f"{SAVED_AND_REQUEUE}\n")


def asking() -> list[signal.Signals]:
    """The signals that ask a run to stop; SIGHUP not under nohup, which has it ignored."""
    ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return [signal.SIGTERM, signal.SIGUSR1] + ([] if ignored else [signal.SIGHUP])


def go_silent() -> None:
    """Standard output and error to nowhere: their terminal is gone."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(nowhere, stream)


def leave_on_interrupt() -> None:
    """A rank started by a launcher leaves silently on ctrl-C; the launcher says the one last line."""
    signal.signal(signal.SIGINT, lambda number, frame: os._exit(INTERRUPTED))
