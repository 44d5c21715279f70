"""The context-parallel group of a rank: transport, topology and schedule, and the state that its calls share."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

import torch

from longctx.attention.buffers import BufferPool
from longctx.attention.transfers import Trace
from longctx.distributed.counters import ByteCounter
from longctx.distributed.transport import Transport
from longctx.topology import Topology


@dataclass(eq=False)
class AttentionGroup:
    """One rank's view of its context-parallel group.

    ulysses: the number of ranks that split heads. kernel: the name of a kernel that must serve (None: the first that
    can). grad_dtype: the type in which dKV travels (None: fp32, or fp64 for fp64). bytes: counts the bytes that this
    rank sends.
    """

    transport: Transport
    topology: Topology
    schedule: str
    ulysses: int
    kernel: str | None = None
    grad_dtype: torch.dtype | None = None
    trace: Trace | None = None
    bytes: ByteCounter = field(default_factory=ByteCounter)
    pool: BufferPool = field(default_factory=BufferPool)
    # Calls are serialised: autograd may run a backward on a thread of its own.
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False)
    # In which modes, training (True) and evaluation, the ranks have been found to read the same batches.
    agreed: set[bool] = field(default_factory=set, repr=False)

    @property
    def rank(self) -> int:
        return self.transport.rank

    @property
    def size(self) -> int:
        return self.transport.size

    @property
    def ring_positions(self) -> int:
        """The number of ring positions: all ranks divided by the Ulysses ranks of a position."""
        return self.size // self.ulysses
