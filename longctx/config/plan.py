"""Config schema of `longctx plan`: that of `longctx train`, the machines, and what to show.

The model and the curriculum may be left out when only a schedule is drawn.
"""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Literal

from pydantic import Field

from longctx.config.base import Format, Length, MachineCount, PerMachine, Positive, Text, Width, schema
from longctx.config.hardware import HardwareConfig
from longctx.config.train import TrainConfig, check_accept


@schema
class DrawConfig:
    """The attention whose schedule is drawn."""

    stage: Text | None = None  #: a stage of the curriculum, drawn as it would be trained; null: the values below
    #: schedule of the attention that is drawn
    schedule: Literal["flat_ring", "double_ring", "allgather_ring", "ulysses_ring"] = "double_ring"
    ulysses: PerMachine | None = None  #: ranks that share heads under ulysses_ring; null: all of a node
    direction: Literal["forward", "backward"] = "backward"  #: pass that is drawn
    seq_len: Length = 65536  #: tokens of the whole sequence
    heads: Width = 32  #: query heads
    kv_heads: Width = 8  #: key and value heads
    head_dim: Width = 128  #: width of a head
    width: Annotated[Positive, Field(ge=20)] = 100  #: columns of the text
    show_ranks: Positive = 8  #: ranks that are drawn, at most
    svg: Text = ""  #: a file for the picture


@schema
class PlanConfig(TrainConfig):
    """The root of configs/plan.yaml: everything a training command says, and the machines it is planned for."""

    name: Text = "plan"  #: name of a run, which a plan does not use
    nodes: MachineCount = 1  #: number of machines
    ranks: PerMachine = 8  #: devices in each machine, a rank on each
    #: what is printed: memory and time of every stage, or the timeline of one attention layer
    show: Literal["stages", "schedule"] = "stages"
    hardware: HardwareConfig = field(default_factory=HardwareConfig)
    draw: DrawConfig = field(default_factory=DrawConfig)
    format: Format = "text"  #: format of what is printed

    def __post_init__(self) -> None:
        """Check accept alone: a drawn model, which has no base to compare with, is planned without its evidence."""
        check_accept(self.accept)
