"""Schedules of context-parallel attention: their data (`hops`) and the functions that make them (`build`)."""

from longctx.schedule.build import build, build_all
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
    "build_all",
    "payload_bytes",
]
