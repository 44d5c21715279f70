"""Virtual ranks: a transport between threads of one process, for tests and benchmarks."""

from __future__ import annotations

import threading
from collections import defaultdict, deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import nullcontext

import torch
from torch import Tensor

from longctx.distributed.transport import PeerLost, Pending


class ThreadWorld:
    """Virtual ranks as threads of one process; with `serial` one runs at a time, so that their times add up.

    A rank keeps its thread from one `run` to the next, because libraries keep plans and handles by thread.
    """

    def __init__(self, size: int, *, serial: bool = False, timeout: float = 60.0) -> None:
        self.size, self.timeout = size, timeout
        self.threads = [ThreadPoolExecutor(1) for _ in range(size)]
        self.turn = threading.Lock() if serial else None
        self._guard = threading.Lock()
        # What was posted and has not met the peer's side yet, in order: by channel, source, to, and whether it sends.
        self._posted: dict[tuple, deque[_Side]] = defaultdict(deque)
        self.failed = False  # whether a rank of this call has raised

    def post(self, way: tuple[str, int, int], tensor: Tensor, *, sends: bool) -> _Side:
        """Post one side of a transfer; way: channel, source, to. Who comes last copies, with no tensor between."""
        mine = _Side(tensor)
        with self._guard:
            others = self._posted[way, not sends]
            if not others:
                self._posted[way, sends].append(mine)
                if self.failed:
                    mine.done.set()
                return mine
            peer = others.popleft()
        source, target = (mine, peer) if sends else (peer, mine)
        try:
            target.tensor.copy_(source.tensor)
        finally:  # where the copy fails, this rank raises why
            mine.done.set()
            peer.done.set()
        return mine

    def run(self, work: Callable[[ThreadTransport], object]) -> list:
        """Call work(transport) on every virtual rank; returns the results by rank.

        Raises the first rank's error, before the PeerLost of those that waited for it.
        """

        def body(rank: int) -> object:
            # On a GPU autograd runs every backward pass of a process in one thread of its own. That thread would wait
            # for a peer's block, which only the peer's backward pass sends.
            with self.turn or nullcontext(), torch.autograd.set_multithreading_enabled(False):
                try:
                    return work(ThreadTransport(self, rank))
                except BaseException:
                    self._end_waits()
                    raise

        self.failed = False
        futures = [thread.submit(body, rank) for rank, thread in enumerate(self.threads)]
        wait(futures)
        self._posted.clear()  # what a failed call has left; its tensors would meet those of the next call
        errors = [error for future in futures if (error := future.exception()) is not None]
        if errors:
            raise next((error for error in errors if not isinstance(error, PeerLost)), errors[0])
        return [future.result() for future in futures]

    def _end_waits(self) -> None:
        """Let the other ranks fail at once instead of waiting for one that has failed."""
        with self._guard:
            self.failed = True
            for sides in self._posted.values():
                for side in sides:
                    side.done.set()


class _Side:
    """One rank's side of a transfer: the tensor that leaves or arrives, and whether it has."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.done = tensor, threading.Event()


class ThreadTransport:
    """The transport of one virtual rank of a ThreadWorld."""

    def __init__(self, world: ThreadWorld, rank: int) -> None:
        self.world, self.rank, self.size = world, rank, world.size

    def post(self, channel: str, send: Tensor, to: int, recv: Tensor, source: int) -> Pending:
        sides = {
            f"receiving from rank {source}": self.world.post((channel, source, self.rank), recv, sends=False),
            f"sending to rank {to}": self.world.post((channel, self.rank, to), send, sends=True),
        }
        return _ThreadPosted(self.world, sides)

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        parts = [tensor if peer == self.rank else torch.empty_like(tensor) for peer in range(self.size)]
        posted = [
            self.post("gather", tensor, peer, parts[peer], peer) for peer in range(self.size) if peer != self.rank
        ]
        for one in posted:
            one.wait()
        return parts

    def unsupported(self, device: str) -> str | None:
        return None

    def close(self) -> None:
        pass


class _ThreadPosted:
    def __init__(self, world: ThreadWorld, sides: dict[str, _Side]) -> None:
        self.world, self.sides = world, sides

    def wait(self) -> None:
        """Wait for both sides; under `serial` the others have their turns meanwhile."""
        turn = self.world.turn
        if turn:
            turn.release()
        try:
            for peer, side in self.sides.items():
                if not side.done.wait(self.world.timeout):
                    raise PeerLost(f"{peer}: nothing within {self.world.timeout} s")
            if self.world.failed:
                raise PeerLost(f"{', '.join(self.sides)}: another rank has failed")
        finally:
            if turn:
                turn.acquire()
