"""Point-to-point transfers between the ranks of one context-parallel group.

A transport posts a send and a receive together on a named channel and returns a handle to wait for. Channels that may
be busy at the same time (each ring level, KV and dKV) are separate communicators, so that they overlap and never
mis-pair: NCCL ignores tags. Every rank posts in the same order. `DistributedTransport` runs on torch.distributed.
`thread_transport` joins virtual ranks that are threads of one process, for tests and benchmarks.
"""

from __future__ import annotations

from collections.abc import Sequence
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
        if not self.groups:
            raise ValueError("this ContextParallel was closed and reaches no other rank; make another one")
        flat = tensor.contiguous().view(-1).view(torch.uint8)
        parts = [torch.empty_like(flat) for _ in range(self.size)]
        try:
            dist.all_gather(parts, flat, group=self.groups["gather"])
        except RuntimeError as error:
            raise PeerLost(f"all-gather over {self.size} ranks: {error}") from error
        return [part.view(tensor.dtype).view(tensor.shape) for part in parts]

    def unsupported(self, device: str) -> str | None:
        if not self.groups:
            return "their ContextParallel was closed; make another one"
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
