"""Config schema of `longctx bench longest`, which finds the longest sequence that a training step takes."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from longctx.config.base import AboveZero, Format, Given, Minutes, PerMachine, Window, schema
from longctx.config.model import ModelConfig
from longctx.config.train import EngineConfig, OptimConfig


@schema
class BenchLongestConfig:
    """The longest sequence of a full training step on one device, beside the planner's prediction."""

    model: ModelConfig
    engine: EngineConfig = EngineConfig()
    optim: OptimConfig = OptimConfig()
    #: GiB that the process (on a CPU) or its tensors on the device (on a GPU) may take; null: what there is. The
    #: libraries alone take 0.3 on a CPU
    memory_gib: Annotated[AboveZero, Field(ge=0.5)] | None = None
    start: Window | None = None  #: the first length tried; null: the longest by the plan
    multiple: Window = 1024  #: lengths are multiples of this many tokens
    most: Window = 2**24  #: longest sequence tried
    #: the search ends once the shortest length that failed is within this share of the longest that ran
    precision: Annotated[AboveZero, Field(lt=1)] = 0.02
    trial_minutes: Minutes = 30.0  #: a trial that takes longer ends the search
    threads: PerMachine | None = None  #: CPU threads of a trial; null: torch's own choice
    out: Given = "runs/bench-longest"  #: folder for longest.json; trials that are in it are not repeated
    format: Format = "text"  #: format of what is printed

    def __post_init__(self) -> None:
        if self.most < self.multiple:
            raise ValueError(f"most={self.most} is below multiple={self.multiple}, so there is no length to try")
