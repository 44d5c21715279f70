"""The loader: one global cursor over a stage's sequences, and a thread that reads ahead.

The cursor counts sequences consumed by the whole run. What a rank reads of the step that begins at a cursor is
a function of the cursor alone (longctx.decide.Shares says which sequences, the layout which positions), so
nothing else is remembered: resuming is opening at a cursor, at any world size.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Generic, TypeVar

T = TypeVar("T")


class Loader(Generic[T]):
    """Iterates over read(cursor) for the steps from `cursor` to the last whole batch before `end`.

    read: what this rank takes of the step that begins at a cursor; called in order on one thread, `ahead` steps
    before they are asked for. Its errors are raised where the step is asked for. Use as a context manager:
    leaving it forgets what was read ahead and ends the thread.
    """

    def __init__(self, read: Callable[[int], T], *, batch: int, cursor: int, end: int, ahead: int = 1) -> None:
        self.cursor = cursor  # sequences consumed by the whole run, up to the last step handed out
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
