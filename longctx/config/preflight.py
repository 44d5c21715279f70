"""Config schema of `longctx preflight`: the shared folder, the hardware it expects, and the messages that it sends."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from longctx.config.base import AboveZero, Format, Given, Minutes, Seconds, schema
from longctx.config.hardware import HardwareConfig


@schema
class PreflightConfig:
    """The root of configs/preflight.yaml."""

    folder: Given = "runs"  #: folder that every node must see, as runs do
    hardware: HardwareConfig  #: hardware whose links are expected
    device: Literal["auto", "cpu", "cuda"] = "auto"  #: device that the ranks send from
    mbytes: Annotated[AboveZero, Field(ge=1e-3, le=1e5)] = 64.0  #: MB of one message
    meeting_minutes: Minutes = 1.0  #: minutes that the ranks wait for each other
    clock_seconds: Seconds = 2.0  #: seconds by which the nodes' clocks may differ
    format: Format = "text"  #: format of what is printed
