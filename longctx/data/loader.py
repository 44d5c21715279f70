"""The loader: one global cursor over a stage's sequences, and a thread that reads ahead.

The cursor counts sequences consumed by the whole run. Which sequences a data-parallel group reads follows
from the cursor and the batch alone, every rank of a context-parallel group reads the same ones at its own
positions, and nothing else is remembered: resuming is opening at a cursor, at any world size.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np

from longctx.data.stage import LocalSequence, StageData


@dataclass(frozen=True)
class LocalBatch:
    """A step's sequences of this rank; cursor: the global one after the step, to be saved with it."""

    sequences: tuple[LocalSequence, ...]
    indices: tuple[int, ...]
    cursor: int


def share_of(cursor: int, batch: int, dp_rank: int, dp: int) -> range:
    """The sequences of one data-parallel group in the step that begins at `cursor`.

    Groups take consecutive runs, so that the batch is in one order for every dp. Raises ValueError when the
    batch does not divide.
    """
    if batch % dp:
        raise ValueError(f"batch={batch} sequences do not divide over dp={dp} groups")
    each = batch // dp
    return range(cursor + dp_rank * each, cursor + (dp_rank + 1) * each)


class Loader:
    """Iterates over steps from `cursor` to the stage's last whole batch, `ahead` steps read in the
    background.

    positions: int64 [n], this rank's places in a sequence. Use as a context manager: leaving it ends the
    thread.
    """

    def __init__(
        self,
        stage: StageData,
        *,
        batch: int,
        cursor: int = 0,
        dp_rank: int = 0,
        dp: int = 1,
        positions: np.ndarray | None = None,
        ahead: int = 2,
    ) -> None:
        share_of(cursor, batch, dp_rank, dp)
        self._stage = stage
        self._batch = batch
        self._cursor = cursor
        self._dp_rank = dp_rank
        self._dp = dp
        self._positions = np.arange(stage.seq_len) if positions is None else np.asarray(positions)
        self._ready: queue.Queue[Any] = queue.Queue(maxsize=max(ahead, 1))
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._fill, name="longctx-loader", daemon=True)
        self._thread.start()

    def __enter__(self) -> Loader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __iter__(self) -> Iterator[LocalBatch]:
        while True:
            item = self._ready.get()
            if item is None:
                return
            if isinstance(item, Exception):
                raise item
            self._cursor = item.cursor
            yield item

    @property
    def cursor(self) -> int:
        """Sequences consumed by the whole run, up to the last batch handed out."""
        return self._cursor

    def close(self) -> None:
        self._stop.set()
        while self._thread.is_alive():
            try:
                self._ready.get(timeout=0.05)
            except queue.Empty:
                continue
        self._thread.join()

    def _fill(self) -> None:
        try:
            for cursor in range(self._cursor, len(self._stage) - self._batch + 1, self._batch):
                mine = share_of(cursor, self._batch, self._dp_rank, self._dp)
                read = tuple(self._stage.local(index, self._positions) for index in mine)
                if not self._put(LocalBatch(read, tuple(mine), cursor + self._batch)):
                    return
            self._put(None)
        except Exception as error:  # handed to the iterating thread, which raises it
            self._put(error)

    def _put(self, item: LocalBatch | Exception | None) -> bool:
        while not self._stop.is_set():
            try:
                self._ready.put(item, timeout=0.1)
            except queue.Full:
                continue
            return True
        return False


def multiset(stage: StageData, indices: Sequence[int]) -> dict[str, int]:
    """How often each document's piece stands in these sequences: what no resume may change."""
    counts: dict[str, int] = {}
    for index in indices:
        for name in stage.documents(index):
            counts[name] = counts.get(name, 0) + 1
    return counts
