"""Transfers between the ranks of a context-parallel group, and the count of what they moved."""

from longctx.comm.counters import ByteCounter
from longctx.comm.transport import (
    DistributedTransport,
    PeerLost,
    SingleRankTransport,
    ThreadTransport,
    ThreadWorld,
    Transport,
    leave_world,
)

__all__ = [
    "ByteCounter",
    "DistributedTransport",
    "PeerLost",
    "SingleRankTransport",
    "ThreadTransport",
    "ThreadWorld",
    "Transport",
    "leave_world",
]
