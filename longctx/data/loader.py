"""The data loader: a global cursor over a stage's sequences, and a thread that reads ahead.

The cursor counts the sequences that the whole run has consumed. It determines what a rank reads for a step:
longctx.decide.Shares gives the sequences, the layout gives the positions. So the cursor is the loader's only state,
and a run can resume at any cursor with any world size.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Generic, TypeVar

T = TypeVar("T")


class Loader(Generic[T]):
    """Iterate over read(cursor) for every step from `cursor` to the last full batch before `end`.

    read(cursor) returns this rank's data of the step that begins at a cursor. One thread calls it in order, `ahead`
    steps before the data is needed; its errors are raised by `next`. Use the loader as a context manager: leaving it
    discards what was read ahead and ends the thread.
    """

    def __init__(self, read: Callable[[int], T], *, batch: int, cursor: int, end: int, ahead: int = 1) -> None:
        self.cursor = cursor  # sequences consumed by the whole run, including the last step returned
        self._read, self._batch, self._end, self._ahead = read, batch, end, max(ahead, 1)
        self._asked = cursor
        self._coming: deque[Future[T]] = deque()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="longctx-loader")
        self._ask()

    def __enter__(self) -> Loader[T]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        if not self._coming:
            raise StopIteration
        item = self._coming.popleft().result()
        self.cursor += self._batch
        self._ask()
        return item

    def _ask(self) -> None:
        while len(self._coming) < self._ahead and self._asked + self._batch <= self._end:
            self._coming.append(self._pool.submit(self._read, self._asked))
            self._asked += self._batch
