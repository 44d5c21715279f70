"""Checks of this machine before a rank starts: device, dtype, attention kernel and memory.

They refuse with the planner's arithmetic what would fail or be very slow later.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from longctx import console
from longctx.decide import Machines, choose_kernel
from longctx.distributed.ranks import may_share_devices
from longctx.errors import UserError
from longctx.host_memory import host_memory
from longctx.planner.remedies import DeviceLimits, check_memory
from longctx.shape import Shape, shape_of_model
from longctx.train.engine import check_bfloat16

if TYPE_CHECKING:
    from longctx.config.model import ModelConfig
    from longctx.config.train import EngineConfig, TrainConfig
    from longctx.curriculum import Stage

_NARROW = ("DEFAULT", "AVX2")  # what torch calls x86 CPUs without AVX-512


def device_type(engine: EngineConfig) -> str:
    """The device type of the ranks: cuda or cpu."""
    return "cpu" if engine.device == "cpu" or not torch.cuda.is_available() else "cuda"


def kernel_of(model: ModelConfig, shape: Shape, device: str, *, tried: bool = False) -> str:
    """The attention kernel for the model on this machine. Raises UserError where none fits, or only a slow one.

    tried: whether a GPU tries it first, as a rank does that is about to attend.
    """
    from longctx.attention.kernels import KERNELS, Problem, explain
    from longctx.attention.trial import failure

    capability = torch.cuda.get_device_capability() if device == "cuda" else (0, 0)
    dtype = getattr(torch, model.dtype)
    problem = Problem(device, dtype, shape.head_dim, shape.heads, shape.kv_heads, capability)
    reasons = explain(problem)
    able = [name for name, why in reasons.items() if not why and model.attention_kernel in ("auto", name)]
    for name in able if tried else ():
        if not (why := failure(KERNELS[name], problem)):
            break
        reasons[name] = [why]
    return choose_kernel(device, model.dtype, reasons, model.attention_kernel)


def check_machine(
    config: TrainConfig, stages: Sequence[Stage], world: int, local_world: int, *, later: Sequence[Stage] = ()
) -> None:
    """Raise UserError where this machine lacks the attention kernel or the memory; config: a settled one.

    later: stages behind launch.until, of which a line on the screen says where they do not fit.
    """
    shape, device = shape_of_model(config.model), device_type(config.engine)
    if device == "cuda" and config.model.dtype == "bfloat16":
        check_bfloat16(torch.cuda.get_device_capability(), torch.cuda.get_device_name())
    kernel = kernel_of(config.model, shape, device)
    if "memory" not in config.accept:
        room = room_here(Machines(world, local_world), device, kernel)
        check_memory(stages, shape, config, room)
        try:
            check_memory(later, shape, config, room)
        except UserError as error:
            console.remark(f"behind launch.until={config.launch.until}, which ends this start: {error}")


def room_here(machines: Machines, device: str, kernel: str) -> DeviceLimits:
    """The memory of a rank on this machine: what its GPU has left, or on CPUs an equal part of the node's.

    What other processes hold on the GPU is said, and counts as gone; ranks that share a GPU share the rest.
    """
    if device == "cuda":
        free, total = torch.cuda.mem_get_info(0)
        taken = max(0, total - free - torch.cuda.memory_reserved(0))
        if taken > 0.05 * total:
            console.say(
                f"other processes hold {taken / 2**30:.1f} of the GPU's {total / 2**30:.1f} GiB (nvidia-smi names "
                "them); this run counts on the rest"
            )
        sharing = -(-machines.ranks_per_node // torch.cuda.device_count()) if may_share_devices() else 1
        return DeviceLimits(machines, device, kernel, (total - taken) / sharing, host_memory())
    return DeviceLimits(machines, device, kernel, host_memory() / machines.ranks_per_node)


def describe(model: ModelConfig, shape: Shape, device: str) -> str:
    """The first line of a run: the dtypes of weights, masters and optimizer, and the attention kernel."""
    wide = "float64" if model.dtype == "float64" else "float32"
    masters = f"{model.dtype} weights" + (f" with {wide} masters" if model.dtype != wide else "")
    kernel = kernel_of(model, shape, device, tried=True)
    return f"{masters}, gradients and optimizer in {wide}, attention kernel {kernel} on {device}"


def remark_slow_dtype(model: ModelConfig, device: str) -> None:
    """Warn where a CPU without vector units of 512 bits would train in bfloat16.

    On an AVX2 core, x W^T of 2,048 x 576 by 576 x 1,536 ran at 7.6 GFLOP/s in bfloat16 and 65 in float32, and the
    gradient by x at 1.5 and 68 (torch 2.13).
    """
    if device == "cpu" and model.dtype == "bfloat16" and torch.backends.cpu.get_cpu_capability() in _NARROW:
        console.remark(
            "this CPU multiplies bfloat16 many times slower than float32: model.dtype=float32 is faster here, and the "
            "plan's seconds do not hold"
        )
