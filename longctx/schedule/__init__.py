"""Schedules of context-parallel attention: their data (`hops`) and the one function that makes them (`build`)."""

from longctx.schedule.build import build
from longctx.schedule.hops import (
    OWN,
    SCHEDULES,
    Channel,
    Compute,
    Hop,
    Message,
    Payload,
    RankSchedule,
    Sizes,
    Transfer,
    payload_bytes,
)

__all__ = [
    "OWN",
    "SCHEDULES",
    "Channel",
    "Compute",
    "Hop",
    "Message",
    "Payload",
    "RankSchedule",
    "Sizes",
    "Transfer",
    "build",
    "payload_bytes",
]
