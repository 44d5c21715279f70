"""What `longctx plan` can be told: everything `longctx train` can, plus the machines and what to show.

The model and the curriculum may be left out when only a schedule is drawn.
"""

from __future__ import annotations

from dataclasses import field
from typing import Literal

from longctx.config.base import Format, Length, Text, schema
from longctx.config.hardware import HardwareConfig
from longctx.config.train import TrainConfig


@schema
class DrawConfig:
    """The attention whose schedule is drawn: that of `stage` as it would be trained, or the one spelt out
    here. direction: which pass. width: columns of the text. svg: a file for the picture. show_ranks: at
    most so many.
    """

    stage: Text | None = None
    schedule: Literal["flat_ring", "double_ring", "allgather_ring", "ulysses_ring"] = "double_ring"
    ulysses: int | None = None
    direction: Literal["forward", "backward"] = "backward"
    tokens: Length = 65536
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    width: int = 100
    show_ranks: int = 8
    svg: Text = ""

    def __post_init__(self) -> None:
        if self.width < 20 or self.show_ranks < 1:
            raise ValueError(f"width={self.width} must be 20 or more and show_ranks={self.show_ranks} 1 or more")


@schema
class PlanConfig(TrainConfig):
    """The root of configs/plan.yaml. nodes, ranks: the planned machines, `ranks` devices in each node.

    show: `stages` for memory and time of every stage, `schedule` for the timeline of one attention layer.
    """

    name: Text = "plan"
    nodes: int = 1
    ranks: int = 8
    show: Literal["stages", "schedule"] = "stages"
    hardware: HardwareConfig = field(default_factory=HardwareConfig)
    draw: DrawConfig = field(default_factory=DrawConfig)
    format: Format = "text"

    def __post_init__(self) -> None:
        if self.nodes < 1 or self.ranks < 1:
            raise ValueError(f"nodes={self.nodes}, ranks={self.ranks}: both must be 1 or more")
