"""The interface between the training loop and the owner of the weights, and the choice between two engines.

Every engine averages gradients over all ranks, data and context parallel alike; the step scales the loss so that this
average is the exact gradient. The interface is small enough for an FSDP2 engine.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Protocol

import torch

from longctx import console
from longctx.decide import check_engine
from longctx.errors import UserError
from longctx.train.fragments import Fragment, FragmentReader
from longctx.train.parameters import freeze

if TYPE_CHECKING:
    from longctx.config.train import EngineConfig, OptimConfig
    from longctx.distributed.ranks import Ranks
    from longctx.model import LossModel, LossOutput
    from longctx.model.placement import Place


class Engine(Protocol):
    """Weights, gradients and optimizer state of one run, on this rank.

    facts: distributed type, world, ZeRO stage, backend and dtypes as obtained, for the log.
    """

    facts: dict[str, Any]
    model: LossModel

    def forward(self, **batch: Any) -> LossOutput:
        """The loss of a micro-batch. A sharded model's full weights may be read only inside this call."""
        ...

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        """Add a micro-batch's gradient. last: it is the step's last micro-batch, and the sum is reduced over ranks."""
        ...

    def grad_norm(self) -> torch.Tensor:
        """The L2 norm of the averaged gradient before clipping, a scalar equal on all ranks (a collective).

        It stays on the device, so that the step reads it together with the loss. NaN where it is not finite.
        """
        ...

    def step(self, lr: float, norm: float) -> None:
        """Clip the gradient, whose norm the caller has read, update the weights, and clear the gradient."""
        ...

    def discard(self) -> None:
        """Clear the gradient without an update."""
        ...

    def shapes(self) -> dict[str, list[int]]:
        """The full shape of every trainable parameter, by name."""
        ...

    def fragments(self) -> Iterator[Fragment]:
        """This rank's share of weights and moments. Over all ranks, every element comes exactly once."""
        ...

    def restore(self, reader: FragmentReader) -> None:
        """Take weights and moments from a checkpoint."""
        ...

    def state_for_export(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, full tensor), one at a time. A collective: every rank iterates, and rank 0 has the data."""
        ...

    def close(self) -> None: ...


def check_bfloat16(capability: tuple[int, int], name: str) -> None:
    """Raise UserError for a GPU without bfloat16 units; torch's own is_bf16_supported counts emulation as support."""
    if capability < (8, 0):
        raise UserError(
            f"model.dtype=bfloat16, but {name} has no bfloat16 units (compute capability "
            f"{'.'.join(map(str, capability))}, 8.0 is the first with them); train in model.dtype=float32 with "
            "model.attention_kernel=reference, which is slow and for short lengths, or use a newer GPU (configs/model)"
        )


def build(config: EngineConfig, optim: OptimConfig, model: LossModel, ranks: Ranks) -> Engine:
    """Build the engine that the config names. Raises UserError for settings that it does not support."""
    kinds = {parameter.dtype for parameter in model.parameters()}
    check_engine(config, str(next(model.parameters()).dtype).removeprefix("torch."))
    if torch.bfloat16 in kinds and ranks.device.type == "cuda":
        check_bfloat16(torch.cuda.get_device_capability(ranks.device), torch.cuda.get_device_name(ranks.device))
    freeze(model, [] if optim.freeze == "auto" else optim.freeze)  # outside a run no adapter is made
    if config.name == "deepspeed":
        from longctx.train.zero import ZeroEngine

        engine: Engine = ZeroEngine(config, optim, model, ranks)
    else:
        from longctx.train.replicated import ReplicatedEngine

        engine = ReplicatedEngine(config, optim, model, ranks)
    console.say("engine: " + ", ".join(f"{key} {value}" for key, value in engine.facts.items()))
    return engine


def placer(config: EngineConfig, optim: OptimConfig, dtype: str, ranks: Ranks) -> Place | None:
    """The function that cuts each parameter to this rank's share as it is loaded; None except under ZeRO-3."""
    if config.name != "deepspeed" or config.zero != 3:
        return None
    from longctx.train.zero import zero3_placer

    return zero3_placer(config, optim, getattr(torch, dtype), ranks)
