"""Says before anything is read which lengths of `longctx eval` need more memory than their device has."""

from __future__ import annotations

import torch

from longctx import console
from longctx.config.eval import EvalConfig
from longctx.distributed.ranks import Ranks
from longctx.dtype import BYTES, stated
from longctx.host_memory import host_memory
from longctx.planner.evidence import fits, fitting_words, largest, readings
from longctx.planner.remedies import GIB
from longctx.shape import shape_of
from longctx.storage.model import read_config

KEYS = ("needle.lengths", "loss_lengths")


def remark_memory(config: EvalConfig, name: str, path: str, ranks: Ranks) -> None:
    """Print a warning for a model with the lengths that would fit, if others do not; path: a folder or hub id."""
    values, device = read_config(path)[0], ranks.device.type
    dtype = stated(values) or "float32"
    needs = readings(
        config.needle, config.loss_lengths, KEYS, shape_of(values, path), dtype if dtype in BYTES else "bfloat16",
        device, ranks.threads(),
    )  # fmt: skip
    room = _room(ranks)
    missing = [need for need in needs if not fits(need, room)]
    if not missing:
        return
    most = largest(missing)
    fitting = fitting_words(needs, room)
    together = f", {most.at_once} at once" if most.at_once > 1 else ""
    console.remark(
        f"{name}: {most.key} asks for {most.tokens:,} tokens{together}, which need about {most.total / GIB:.3g} GiB, "
        f"and the device has {room / GIB:.3g}: it will probably end out of memory there"
        + (f"; {fitting} would fit" if fitting else "")
    )


def _room(ranks: Ranks) -> float:
    """Bytes of the rank's device: what other processes leave of its GPU, or its share of the node's memory."""
    if ranks.device.type == "cuda":
        return float(torch.cuda.mem_get_info(ranks.device)[0])
    return host_memory() / ranks.local_world
