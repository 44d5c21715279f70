"""Explains out of memory on a rank in one paragraph: the memory that the plan estimates, and ways to lower it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

from longctx.decide import Machines, planned_kernel
from longctx.errors import OutOfMemory, first_line, out_of_memory
from longctx.planner.remedies import DeviceLimits, lower, needs
from longctx.shape import shape_of_model
from longctx.storage.files import GIB

if TYPE_CHECKING:
    from longctx.config.train import TrainConfig
    from longctx.curriculum import Stage
    from longctx.distributed.ranks import Ranks

_WORDS = {
    "weights": "weights", "gradients": "gradients", "optimizer": "optimizer state",
    "saved": "activations saved for the backward pass", "working": "the layer at work", "ring": "attention's buffers",
    "loss": "logits",
}  # fmt: skip


@contextmanager
def explained(config: TrainConfig, stage: Stage, ranks: Ranks, doing: str) -> Iterator[None]:
    """Turn an allocation failure inside the block into OutOfMemory with an explanation.

    doing: the rank's activity in the block, for the message. The first rank that fails explains; the messages of the
    others are empty.
    """
    try:
        yield
    except OutOfMemory:
        raise
    except Exception as error:
        if not out_of_memory(error):
            raise
        text = explain(error, config, stage, ranks, doing) if _first_to_say(ranks) else ""
    else:
        return
    raise OutOfMemory(text)  # outside the handler: the failed step's tensors are free again


def explain(error: BaseException, config: TrainConfig, stage: Stage, ranks: Ranks, doing: str) -> str:
    """The message: the rank, the failed allocation, a rank's memory by the plan, and up to three remedies."""
    said = first_line(error)
    said = said.split("] . ")[-1].split(" If reserved")[0].rstrip(".")
    shape = shape_of_model(config.model)
    device = ranks.device.type
    kernel = planned_kernel(device, config.model, shape)
    room = DeviceLimits(Machines(ranks.world, ranks.local_world), device, kernel, device_bytes=0.0)
    now = needs([stage], shape, config, room)[0]
    parts = sorted(((getattr(now, name), words) for name, words in _WORDS.items()), reverse=True)
    listed = ", ".join(f"{words} {_gib(size)}" for size, words in parts if size > 0.01 * now.total)
    ways = [f"{text} ({_gib(memory.total)})" for text, memory in lower(stage, shape, config, room)]
    shorter = f"curriculum.stages.{stage.name}.seq_len={max(2, stage.seq_len // 2)}"
    best = "; ".join([*ways, shorter, "more memory"][:3])
    where = f"rank {ranks.rank}" if ranks.world > 1 else "this process"
    return (
        f"{where} ran out of memory while {doing} stage {stage.name} ({said}). By the plan a rank holds "
        f"{_gib(now.total)} in this stage: {listed}. These lower it: {best}. `longctx plan` shows every stage "
        "with the same settings (docs/memory.md)"
    )


def _first_to_say(ranks: Ranks) -> bool:
    """Whether this rank is the first to explain; ranks count in the process group's store."""
    if ranks.world == 1:
        return True
    import torch.distributed as dist

    try:
        return cast(Any, dist.distributed_c10d._get_default_store()).add("out of memory", 1) == 1
    except Exception:  # rank 0 and its store are gone: explaining twice is better than never
        return True


def _gib(size: float) -> str:
    return f"{size / GIB:,.2f} GiB" if size >= 0.01 * GIB else f"{size / 2**20:,.2f} MiB"
