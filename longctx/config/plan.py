"""What `longctx plan` can be told: everything `longctx train` can, plus the machines and what to show.

The model and the curriculum may be left out when only a schedule is drawn.
"""

from __future__ import annotations

from dataclasses import field
from typing import Literal

from longctx.config.base import Format, Length, Text, schema
from longctx.config.train import TrainConfig


@schema
class HardwareConfig:
    """One device and its links. tflops: dense rate of the training dtype; utilization: the share of it that
    training reaches; inner_gbytes, outer_gbytes: GB/s of one device's link inside a node and between nodes;
    latency_us: microseconds a message needs beyond its bytes.
    """

    name: Text = "device"
    tflops: float = 989.0
    utilization: float = 0.45
    memory_gib: float = 80.0
    inner_gbytes: float = 450.0
    outer_gbytes: float = 50.0
    latency_us: float = 10.0

    def __post_init__(self) -> None:
        for name in ("tflops", "memory_gib", "inner_gbytes", "outer_gbytes"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)} must be more than 0")
        if not 0 < self.utilization <= 1:
            raise ValueError(f"utilization={self.utilization} must lie above 0 and not above 1")
        if self.latency_us < 0:
            raise ValueError(f"latency_us={self.latency_us} must be 0 or more")


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
