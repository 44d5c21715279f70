"""The planner's prediction for `longctx bench longest`: memory of a step, and the longest step that fits.

It builds the training config of a trial and asks the functions that `longctx plan` asks, so that a trial is predicted
as a run would be.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from longctx.config.base import build
from longctx.config.bench_longest import BenchLongestConfig
from longctx.config.train import TrainConfig
from longctx.decide import Machines, planned_kernel
from longctx.host_memory import host_memory
from longctx.planner.memory import Memory
from longctx.planner.remedies import GIB, DeviceLimits, needs
from longctx.shape import shape_of_model
from longctx.train.train import resolve_stages

STAGE = "longest"


def training_config(config: BenchLongestConfig, seq_len: int) -> TrainConfig:
    """The training config of a trial: one stage of one step of one sequence."""
    stage = {"seq_len": seq_len, "theta": 500000, "steps": 1, "batch": 1}
    return build(
        TrainConfig,
        {
            "name": "bench-longest",
            "model": config.model, "engine": config.engine, "optim": config.optim,
            "data": {"sources": {"text": {"kind": "text", "path": "."}}, "mixes": {"default": {"text": 1.0}}},
            "curriculum": {"lr": {"peak": 1e-5}, "scratch": True, "stages": {STAGE: stage}},
            "parallel": {"cp": 1},
            "after_training": {"lora": {"enabled": False}},
        },
        origin="bench longest",
    )  # fmt: skip


@dataclass(frozen=True)
class Prediction:
    """The plan of every length on one device.

    longest: the longest multiple of config.multiple that the plan lets fit, None if it lets none fit.
    """

    config: BenchLongestConfig
    device: str
    limits: DeviceLimits

    def memory(self, seq_len: int) -> Memory:
        """The planner's memory of a step of this length."""
        made = training_config(self.config, seq_len)
        return needs(resolve_stages(made), shape_of_model(made.model), made, self.limits)[0]

    @cached_property
    def longest(self) -> int | None:
        low, high, multiple = 0, self.config.most // self.config.multiple + 1, self.config.multiple
        while high - low > 1:  # low fits, high does not
            middle = (low + high) // 2
            if self.limits.holds(self.memory(middle * multiple)):
                low = middle
            else:
                high = middle
        return low * multiple or None

    def at(self, seq_len: int) -> dict[str, Any]:
        """Total, parts and the host's share in GiB."""
        memory = self.memory(seq_len)
        parts = {field.name: getattr(memory, field.name) / GIB for field in dataclasses.fields(memory)}
        return {"total_gib": memory.total / GIB, "host_gib": parts.pop("host"), "parts_gib": parts}


def predict(config: BenchLongestConfig, device: str) -> Prediction:
    """The planner's view of this machine: its device's memory, or `memory_gib` of it."""
    shape = shape_of_model(config.model)
    kernel = planned_kernel(device, config.model, shape)
    if device == "cuda":
        import torch

        whole, host = float(torch.cuda.mem_get_info(0)[1]), host_memory()
    else:
        whole, host = host_memory(), None
    given = whole if config.memory_gib is None else config.memory_gib * GIB
    return Prediction(config, device, DeviceLimits(Machines(1, 1), device, kernel, min(whole, given), host))
