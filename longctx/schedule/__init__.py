"""Schedules of context-parallel attention: the data (`plan`) and the one builder (`build`)."""

from longctx.schedule.build import build
from longctx.schedule.plan import (
    OWN,
    SCHEDULES,
    Compute,
    Message,
    Payload,
    Plan,
    Ring,
    Sizes,
    Step,
    Transfer,
    payload_bytes,
)

__all__ = [
    "OWN",
    "SCHEDULES",
    "Compute",
    "Message",
    "Payload",
    "Plan",
    "Ring",
    "Sizes",
    "Step",
    "Transfer",
    "build",
    "payload_bytes",
]
