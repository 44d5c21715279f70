"""The public API of the attention: a `ContextParallel` owns the ranks' communicators and makes layouts.

Example, on every rank::

    cp = ContextParallel.from_world(nodes=2, schedule="double_ring")
    layout = cp.layout(seq_len=S, documents=boundaries, kind="zigzag")
    q, k, v = (layout.shard(x, dim=2) for x in (q, k, v))
    out = layout.unshard(context_attention(q, k, v, layout), dim=2)

Without torch.distributed, or in a world of one rank, the same code runs and nothing is sent. Schedule and layout depend
only on values that all ranks share, so all ranks raise the same errors and post the same transfers.
"""

from __future__ import annotations

import uuid
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal
from weakref import WeakValueDictionary

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from longctx.attention import op
from longctx.attention.group import AttentionGroup
from longctx.attention.local_layout import Layout
from longctx.attention.rank_attention import LayoutCache
from longctx.attention.transfers import Trace
from longctx.distributed.transport import DetachedTransport, DistributedTransport, SingleRankTransport, Transport
from longctx.layout import LayoutKind, SequenceLayout
from longctx.schedule import SCHEDULES
from longctx.topology import Topology, is_whole, split

Schedule = Literal["flat_ring", "double_ring", "allgather_ring", "ulysses_ring"]

_LONGEST_WAIT = 10**6  # seconds: the timers of sockets hold little more


class ContextParallel(AttentionGroup):
    """A context-parallel group: the ranks that share sequences, and the schedule by which they attend.

    `kernel` names the kernel that must serve (default: the first that can). `grad_dtype` is the type in which dKV
    travels (default: fp32, or fp64 for fp64). `close` frees the communicators. A copy, such as a DataLoader's worker
    makes of a batch's layout, is the same object in this process; in another one it shards and does not attend.

    >>> import longctx, torch
    >>> cp = longctx.ContextParallel.from_world(schedule="flat_ring")  # after init_process_group; without it, one rank
    >>> layout = cp.layout(seq_len=64, documents=[0, 40, 64])
    >>> cp.size, layout.local_len, layout.shard(torch.arange(64)[None], dim=1).shape
    (1, 64, torch.Size([1, 64]))
    >>> cp.close()
    """

    def __init__(
        self,
        transport: Transport,
        topology: Topology,
        schedule: Schedule = "flat_ring",
        *,
        ulysses: int | None = None,
        kernel: str | None = None,
        grad_dtype: torch.dtype | None = None,
        trace: bool = False,
    ) -> None:
        super().__init__(
            transport,
            topology,
            schedule,
            ulysses_ranks(topology.size, topology.nodes, schedule, ulysses),
            kernel=kernel,
            grad_dtype=grad_dtype,
            trace=Trace(transport.rank) if trace else None,
        )
        self.caches: dict[tuple[int, LayoutKind], LayoutCache] = {}
        self.name = uuid.uuid4().hex
        _LIVE[self.name] = self

    def __reduce__(self) -> Any:
        """Pickle the group by its name, because communicators cannot travel."""
        options = {"ulysses": self.ulysses if self.schedule == "ulysses_ring" else None, "kernel": self.kernel}
        return _found, (self.name, self.rank, self.topology, self.schedule, {**options, "grad_dtype": self.grad_dtype})

    @classmethod
    def from_world(
        cls,
        nodes: int = 1,
        schedule: Schedule = "flat_ring",
        ulysses: int | None = None,
        *,
        group: dist.ProcessGroup | None = None,
        timeout: float | None = None,
        kernel: str | None = None,
        grad_dtype: torch.dtype | None = None,
        trace: bool = False,
    ) -> ContextParallel:
        """Make a ContextParallel over all ranks, or over the ranks of `group`; every member must call it.

        Ranks are numbered node by node. `timeout` (seconds) bounds each transfer; the default is the parent group's.
        Raises ValueError when `nodes` does not divide the ranks or `ulysses` does not divide the ranks of a node.
        """
        if timeout is not None and not (isinstance(timeout, int | float) and 0 < timeout <= _LONGEST_WAIT):
            raise ValueError(f"timeout={timeout!r} is not a number of seconds above 0 and up to {_LONGEST_WAIT:,}")
        size = dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1
        ulysses_ranks(size, nodes, schedule, ulysses)
        transport: Transport = SingleRankTransport()
        if size > 1:
            limit = timedelta(seconds=timeout) if timeout is not None else None
            transport = DistributedTransport(group, _channels(schedule), limit)
        return cls(
            transport,
            split(size, nodes),
            schedule,
            ulysses=ulysses,
            kernel=kernel,
            grad_dtype=grad_dtype,
            trace=trace,
        )

    @classmethod
    def from_mesh(cls, mesh, dim: str = "cp", **options) -> ContextParallel:
        """Make a ContextParallel over dimension `dim` of a torch DeviceMesh; `options` as in `from_world`."""
        return cls.from_world(group=mesh.get_group(dim), **options)

    def layout(
        self,
        seq_len: int,
        documents: Tensor | np.ndarray | list[int] | None = None,
        kind: LayoutKind = "zigzag",
        positions: Literal["sequence", "document"] = "sequence",
    ) -> Layout:
        """Distribute a sequence of `seq_len` tokens over the ranks.

        `documents`: cu_seqlens [0, ..., seq_len], or None for one document. `kind`: contiguous, zigzag (balanced for
        one document) or documents (each long document cut into 2N pieces). `positions`: RoPE positions run through the
        sequence or restart with each document. Raises ValueError, which names the argument: see `SequenceLayout`.
        """
        if not is_whole(seq_len) or seq_len >= 2**31:
            raise ValueError(f"seq_len={seq_len!r} is not a number of tokens, a whole number below 2^31")
        if positions not in ("sequence", "document"):
            raise ValueError(f"positions={positions!r} is not one of sequence, document")
        if isinstance(documents, Tensor):
            documents = documents.detach().cpu().numpy()
        elif documents is not None:
            documents = np.asarray(documents)
        arithmetic = SequenceLayout(seq_len, self.ring_positions, kind=kind, boundaries=documents, ulysses=self.ulysses)
        key = (seq_len, kind)
        if key not in self.caches:
            self.caches[key] = LayoutCache(self, seq_len, kind)
        return Layout(self.caches[key], arithmetic, positions == "document")

    def write_trace(self, path: str | Path) -> None:
        """Write this rank's Chrome trace to `path`; needs trace=True."""
        if self.trace is None:
            raise ValueError("trace=False: this ContextParallel kept no trace; make it with trace=True")
        self.trace.write(path)

    def close(self) -> None:
        """Give the communicators back and drop the layouts; a second call does nothing."""
        for cache in self.caches.values():
            op.leave(cache.handle)
        self.caches.clear()
        self.pool.clear()
        self.transport.close()


_LIVE: WeakValueDictionary[str, ContextParallel] = WeakValueDictionary()


def _found(name: str, rank: int, topology: Topology, schedule: Schedule, options: dict[str, Any]) -> ContextParallel:
    """The ContextParallel of this name in this process, or one without peers if there is none."""
    if name in _LIVE:
        return _LIVE[name]
    transport = SingleRankTransport() if topology.size == 1 else DetachedTransport(rank, topology.size)
    made = ContextParallel(transport, topology, schedule, **options)
    made.name = name
    _LIVE[name] = made
    return made


def ulysses_ranks(size: int, nodes: int, schedule: str, ulysses: int | None) -> int:
    """The number of Ulysses ranks; raises ValueError for an invalid combination, before anything is set up."""
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule={schedule!r} is not one of {', '.join(SCHEDULES)}")
    local = split(size, nodes).ranks
    if schedule != "ulysses_ring":
        if ulysses not in (None, 1):
            raise ValueError(f"ulysses={ulysses} with schedule={schedule!r}: only ulysses_ring exchanges heads")
        return 1
    h = local if ulysses is None else ulysses
    if not is_whole(h) or h < 1 or local % h:
        raise ValueError(f"ulysses={h} does not divide the {local} ranks of a node")
    return h


def _channels(schedule: str) -> tuple[str, ...]:
    if schedule in ("double_ring", "allgather_ring"):
        return ("kv.inner", "kv.outer", "dkv.inner", "dkv.outer")
    flat = ("kv.inner", "dkv.inner")
    return (*flat, "heads") if schedule == "ulysses_ring" else flat
