"""The public API: a `ContextParallel` owns the ranks' communicators, its layouts say where tokens lie.

    cp = ContextParallel.from_world(nodes=2, schedule="double_ring") layout = cp.layout(seq_len=S,
    documents=boundaries, kind="zigzag") out_local = context_attention(layout.shard(q, dim=2),
    layout.shard(k, dim=2), layout.shard(v, dim=2), layout) out = layout.unshard(out_local, dim=2)

Without torch.distributed, or with a world of one, everything works and nothing is sent. The schedule and
the layout are derived from global values alone, so that all ranks raise the same errors and post the same
transfers.

    B batch, H heads, S tokens of the sequence, n = S_local tokens of this rank (padding included), D head
    dimension
"""

from __future__ import annotations

import threading
from datetime import timedelta
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from longctx.attention import op
from longctx.attention.courier import Trace
from longctx.attention.executor import Pool
from longctx.attention.prepared import Family
from longctx.attention.sequence import Layout
from longctx.distributed.counters import ByteCounter
from longctx.distributed.wire import ProcessWire, SoloWire, Wire
from longctx.layout import Kind, SequenceLayout
from longctx.schedule import SCHEDULES
from longctx.topology import Topology, split

Schedule = Literal["flat_ring", "double_ring", "allgather_ring", "ulysses_ring"]


class ContextParallel:
    """One group of ranks that share sequences, and the schedule they attend by.

    `kernel` forces a backend by name; `grad_dtype` is the type travelling dKV has (default fp32, fp64 for
    fp64); `timeout` in seconds bounds each transfer (default: the parent group's). Close it to free its
    communicators.
    """

    def __init__(
        self,
        wire: Wire,
        topology: Topology,
        schedule: Schedule = "flat_ring",
        *,
        ulysses: int | None = None,
        kernel: str | None = None,
        grad_dtype: torch.dtype | None = None,
        trace: bool = False,
    ) -> None:
        self.topology, self.schedule = topology, schedule
        self.ulysses = check(topology.size, topology.nodes, schedule, ulysses)
        self.wire, self.kernel, self.grad_dtype = wire, kernel, grad_dtype
        self.rank, self.size = wire.rank, wire.size
        self.positions = self.size // self.ulysses
        self.bytes = ByteCounter()
        self.pool = Pool()
        self.trace = Trace(wire.rank) if trace else None
        self.lock = threading.Lock()  # one call at a time: backward may run on autograd's own thread
        self.families: dict[tuple, Family] = {}

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
        """Over all ranks, or those of `group` (dp x cp), numbered node by node; call it on every member.

        Raises ValueError when `nodes` does not divide the ranks or `ulysses` the ranks of a node.
        """
        size = dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1
        check(size, nodes, schedule, ulysses)
        wire: Wire = SoloWire()
        if size > 1:
            limit = timedelta(seconds=timeout) if timeout is not None else None
            wire = ProcessWire(group, _channels(schedule), limit)
        return cls(
            wire,
            split(size, nodes),
            schedule,
            ulysses=ulysses,
            kernel=kernel,
            grad_dtype=grad_dtype,
            trace=trace,
        )

    @classmethod
    def from_mesh(cls, mesh, dim: str = "cp", **options) -> ContextParallel:
        """Over dimension `dim` of a torch DeviceMesh; `options` as in `from_world`."""
        return cls.from_world(group=mesh.get_group(dim), **options)

    def layout(
        self,
        seq_len: int,
        documents: Tensor | np.ndarray | list[int] | None = None,
        kind: Kind = "zigzag",
        positions: Literal["sequence", "document"] = "sequence",
    ) -> Layout:
        """Where the tokens of a sequence of `seq_len` lie. `documents`: cu_seqlens [0, ..., seq_len] or None.

        `kind`: contiguous, zigzag (balanced for one document), documents (each long one cut into 2N pieces).
        `positions`: run through the sequence, or restart with each document.
        Raises ValueError naming the argument: see `SequenceLayout`.
        """
        if positions not in ("sequence", "document"):
            raise ValueError(f"positions={positions!r} is not one of sequence, document")
        if isinstance(documents, Tensor):
            documents = documents.detach().cpu().numpy()
        elif documents is not None:
            documents = np.asarray(documents)
        arithmetic = SequenceLayout(seq_len, self.positions, kind=kind, boundaries=documents, ulysses=self.ulysses)
        key = (seq_len, kind)
        if key not in self.families:
            self.families[key] = Family(self, seq_len, kind)
        return Layout(self.families[key], arithmetic, positions == "document")

    def write_trace(self, path: str | Path) -> None:
        """Write this rank's Chrome trace (needs trace=True)."""
        if self.trace is None:
            raise ValueError("trace=False: this ContextParallel kept no trace; make it with trace=True")
        self.trace.write(path)

    def close(self) -> None:
        """Destroy the communicators and forget the layouts; calling it again does nothing."""
        for family in self.families.values():
            op.leave(family.handle)
        self.families.clear()
        self.pool.clear()
        self.wire.close()


def check(size: int, nodes: int, schedule: str, ulysses: int | None) -> int:
    """The Ulysses ranks of a valid combination; ValueError otherwise, before anything is set up."""
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule={schedule!r} is not one of {', '.join(SCHEDULES)}")
    local = split(size, nodes).ranks
    if schedule != "ulysses_ring":
        if ulysses not in (None, 1):
            raise ValueError(f"ulysses={ulysses} with schedule={schedule!r}: only ulysses_ring exchanges heads")
        return 1
    h = local if ulysses is None else ulysses
    if h < 1 or local % h:
        raise ValueError(f"ulysses={h} does not divide the {local} ranks of a node")
    return h


def _channels(schedule: str) -> tuple[str, ...]:
    if schedule in ("double_ring", "allgather_ring"):
        return ("kv.inner", "kv.outer", "dkv.inner", "dkv.outer")
    flat = ("kv.inner", "dkv.inner")
    return (*flat, "heads") if schedule == "ulysses_ring" else flat
