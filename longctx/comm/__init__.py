"""Transfers between the ranks of a context-parallel group, and the count of what they moved."""

from longctx.comm.counters import ByteCounter
from longctx.comm.wire import CHANNELS, LocalWire, LocalWorld, PeerLost, ProcessWire, SoloWire, Wire, leave_world

__all__ = [
    "CHANNELS",
    "ByteCounter",
    "LocalWire",
    "LocalWorld",
    "PeerLost",
    "ProcessWire",
    "SoloWire",
    "Wire",
    "leave_world",
]
