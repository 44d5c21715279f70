"""Point-to-point transfers between the ranks of one context-parallel group.

A transport posts a send and a receive together on a named channel and returns a handle to wait for. Channels that may
be busy at the same time (each ring level, KV and dKV) are separate communicators, so that they overlap and never
mis-pair: NCCL ignores tags. Every rank posts in the same order. `DistributedTransport` runs on torch.distributed.
`ThreadTransport` joins virtual ranks that are threads of one process, for tests and for benchmarks without a network.
"""

from __future__ import annotations

import threading
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import nullcontext
from datetime import timedelta
from inspect import signature
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor


class PeerLost(RuntimeError):
    """A transfer failed or timed out; the message names the hop, the payload and the peer."""


class Pending(Protocol):
    """A posted transfer; `wait` returns when both directions are done and raises PeerLost, which names the peer."""

    def wait(self) -> None: ...


class Transport(Protocol):
    """Carries tensors between the ranks of a group.

    `post` sends one tensor to a peer and receives one from a peer, which may be the same one.
    """

    rank: int
    size: int

    def post(self, channel: str, send: Tensor, to: int, recv: Tensor, source: int) -> Pending: ...

    def all_gather(self, tensor: Tensor) -> list[Tensor]: ...

    def unsupported(self, device: str) -> str | None:
        """The reason why tensors of this device type cannot travel, or None if they can."""
        ...

    def close(self) -> None: ...


class SingleRankTransport:
    """The transport of a single rank, which has no peer."""

    rank, size = 0, 1

    def post(self, channel: str, send: Tensor, to: int, recv: Tensor, source: int) -> Pending:
        raise AssertionError("a single rank posts no transfer")

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        return [tensor]

    def unsupported(self, device: str) -> str | None:
        return None

    def close(self) -> None:
        pass


class DetachedTransport:
    """The transport of a rank's copy in another process, such as a data loader's worker: it reaches no peer."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size

    def post(self, channel: str, send: Tensor, to: int, recv: Tensor, source: int) -> Pending:
        raise self._refused()

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        raise self._refused()

    def _refused(self) -> ValueError:
        return ValueError(
            f"this layout is a copy of one of rank {self.rank} in another process and reaches no other rank: it cuts "
            "batches and cannot attend or gather; make a layout with this process's own ContextParallel"
        )

    def unsupported(self, device: str) -> str | None:
        return None

    def close(self) -> None:
        pass


class _Posted:
    def __init__(self, works: Sequence[dist.Work], peers: Sequence[str]) -> None:
        self.works, self.peers = works, peers

    def wait(self) -> None:
        for work, peer in zip(self.works, self.peers, strict=True):
            try:
                work.wait()
            except RuntimeError as error:
                raise PeerLost(f"{peer}: {error}") from error


class DistributedTransport:
    """A transport on torch.distributed: one process group per channel, made by its members alone."""

    def __init__(
        self, group: dist.ProcessGroup | None, channels: Sequence[str], timeout: timedelta | None = None
    ) -> None:
        parent = group if group is not None else dist.group.WORLD
        assert parent is not None
        ranks = dist.get_process_group_ranks(parent)
        self.rank, self.size = dist.get_rank(parent), len(ranks)
        timeout = timeout or _timeout_of(parent)
        backend = dist.get_backend_config(parent)
        self.backends = dict(part.split(":") for part in str(backend).split(","))  # "cpu:gloo,cuda:nccl"
        self.keys = {channel: (tuple(ranks), channel, timeout, str(backend)) for channel in (*channels, "gather")}
        self.groups = {channel: _take(key) for channel, key in self.keys.items()}

    def post(self, channel: str, send: Tensor, to: int, recv: Tensor, source: int) -> Pending:
        group = self.groups[channel]
        # Post the receive first: if both peers are one, gloo would queue its "ready" note behind our own data.
        operations = [
            dist.P2POp(dist.irecv, recv, group=group, group_peer=source),
            dist.P2POp(dist.isend, send, group=group, group_peer=to),
        ]
        try:
            works = dist.batch_isend_irecv(operations)
        except RuntimeError as error:
            raise PeerLost(f"posting to rank {to} and from rank {source}: {error}") from error
        names = [f"receiving from rank {source}", f"sending to rank {to}"]
        return _Posted(works, names if len(works) == 2 else [", ".join(names)])

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        """Return the tensors of all ranks; they travel as bytes, because gloo does not know every type."""
        flat = tensor.contiguous().view(-1).view(torch.uint8)
        parts = [torch.empty_like(flat) for _ in range(self.size)]
        try:
            dist.all_gather(parts, flat, group=self.groups["gather"])
        except RuntimeError as error:
            raise PeerLost(f"all-gather over {self.size} ranks: {error}") from error
        return [part.view(tensor.dtype).view(tensor.shape) for part in parts]

    def unsupported(self, device: str) -> str | None:
        if device not in self.backends:
            return f"the process group has backends for {', '.join(self.backends)} only"
        if self.backends[device] == "gloo" and device != "cpu":
            return "gloo sends CPU tensors only; initialise the process group with nccl"
        return None

    def close(self) -> None:
        for channel, group in self.groups.items():
            _give_back(self.keys[channel], group)
        self.groups = {}


# Groups of closed transports are kept for the next transport over the same ranks. torch names a group that its members
# make alone after its ranks and the number of live groups, so a group that is destroyed and made again would take its
# old name and find its old addresses in the store. At most as many are kept as were ever open at once. They belong to
# the default group under which they were made.
_Key = tuple[tuple[int, ...], str, timedelta | None, str]  # ranks, channel, timeout, backend
_idle: dict[_Key, list[dist.ProcessGroup]] = {}
_made_under: list[dist.ProcessGroup | None] = [None]


def _take(key: _Key) -> dist.ProcessGroup:
    if _made_under[0] is not dist.group.WORLD:
        _idle.clear()
        _made_under[0] = dist.group.WORLD
    if kept := _idle.get(key):
        return kept.pop()
    ranks, channel, timeout, backend = key
    # torch 2.11 has no sort_ranks: it sorts the ranks of every group, so the parent's are in order there.
    keep_order: dict[str, Any] = {"sort_ranks": False} if "sort_ranks" in signature(dist.new_group).parameters else {}
    group = dist.new_group(
        list(ranks),
        timeout=timeout,
        backend=backend,
        use_local_synchronization=True,
        group_desc=f"longctx.{channel}",
        **keep_order,
    )
    assert isinstance(group, dist.ProcessGroup), "this rank is a member"
    return group


def leave_world() -> None:
    """Destroy the default group and drop the groups kept here.

    A group that lives until the interpreter ends may abort the process from one of its threads.
    """
    _idle.clear()
    if dist.is_initialized():
        dist.destroy_process_group()
    _made_under[0] = None


def _give_back(key: _Key, group: dist.ProcessGroup) -> None:
    if _made_under[0] is dist.group.WORLD:
        _idle.setdefault(key, []).append(group)


def _timeout_of(group: dist.ProcessGroup) -> timedelta | None:
    """The timeout of the parent group, which torch does not pass on to new groups."""
    device = torch.device("cuda" if "nccl" in str(dist.get_backend(group)) else "cpu")
    options = getattr(group._get_backend(device), "options", None)
    return getattr(options, "_timeout", None)


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
