"""What the loop needs from whoever owns the weights: a small interface, and the choice between two engines.

Every engine averages gradients over all ranks, data and context parallel alike; the step scales the loss so
that this average is the exact gradient. Small enough that FSDP2 can come behind it later.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from fnmatch import fnmatch
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from longctx import console
from longctx.decide import check_engine
from longctx.errors import UserError
from longctx.train.fragments import Fragment, FragmentReader

if TYPE_CHECKING:
    from longctx.config.train import EngineConfig, OptimConfig
    from longctx.distributed.ranks import Ranks
    from longctx.model import LossModel, LossOutput
    from longctx.model.placement import Place


class Engine(Protocol):
    """Weights, gradients and optimizer state of one run, on this rank.

    facts: what was really obtained (distributed type, world, ZeRO stage, backend, dtypes), for the log.
    """

    facts: dict[str, Any]
    model: LossModel

    def forward(self, **batch: Any) -> LossOutput:
        """The wrapped model's loss: a sharded model's whole weights may be read only in here."""
        ...

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        """Add a micro-batch's gradient; last: it closes the accumulation window and is reduced over ranks."""
        ...

    def grad_norm(self) -> float:
        """L2 norm of the averaged gradient, equal on all ranks (a collective), before clipping."""
        ...

    def step(self, lr: float) -> None:
        """Clip and apply the gradient, then forget it."""
        ...

    def discard(self) -> None:
        """Forget the gradient."""
        ...

    def shapes(self) -> dict[str, list[int]]:
        """Trainable parameters and their full shapes."""
        ...

    def fragments(self) -> Iterator[Fragment]:
        """This rank's share of weights and moments; over all ranks, every element exactly once."""
        ...

    def restore(self, reader: FragmentReader) -> None:
        """Take weights and moments from a checkpoint."""
        ...

    def state_for_export(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, full tensor) one at a time, a collective; every rank iterates, rank 0 has the data."""
        ...

    def close(self) -> None: ...


def build(config: EngineConfig, optim: OptimConfig, model: LossModel, ranks: Ranks) -> Engine:
    """The engine the config names. Raises UserError for what it cannot do."""
    kinds = {parameter.dtype for parameter in model.parameters()}
    check_engine(config, str(next(model.parameters()).dtype).removeprefix("torch."))
    if torch.bfloat16 in kinds and ranks.device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise UserError(
            f"model.dtype=bfloat16, but {torch.cuda.get_device_name(ranks.device)} has no bfloat16 units; use "
            "model.dtype=float32 (configs/model)"
        )
    freeze(model, [] if optim.freeze == "auto" else optim.freeze)  # outside a run no adapter is made
    if config.name == "deepspeed":
        from longctx.train.zero import ZeroEngine

        engine: Engine = ZeroEngine(config, optim, model, ranks)
    else:
        from longctx.train.replicated import ReplicatedEngine

        engine = ReplicatedEngine(optim, model, ranks)
    console.say("engine: " + ", ".join(f"{key} {value}" for key, value in engine.facts.items()))
    return engine


def placer(config: EngineConfig, optim: OptimConfig, dtype: str, ranks: Ranks) -> Place | None:
    """What cuts each parameter to this rank's share as it is loaded; None for engines that start from a whole model."""
    if config.name != "deepspeed" or config.zero != 3:
        return None
    from longctx.train.zero import placer3

    return placer3(config, optim, getattr(torch, dtype), ranks)


def freeze(model: nn.Module, patterns: Iterable[str]) -> None:
    """Stop training the parameters whose names match a pattern such as `*embed_tokens*`."""
    names = [name for name, _ in model.named_parameters()]
    for pattern in patterns:
        hit = [name for name in names if fnmatch(name, pattern)]
        if not hit:
            raise UserError(
                f"optim.freeze={pattern!r} matches no parameter; names look like {names[0]} (configs/optim)"
            )
        for name in hit:
            model.get_parameter(name).requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError("optim.freeze leaves nothing to train; drop a pattern (configs/optim)")


def trainable(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def full_shape(parameter: torch.Tensor) -> torch.Size:
    """The parameter's shape, also when only a share of it is here."""
    return getattr(parameter, "ds_shape", parameter.shape)


def decay_groups(named: Iterable[tuple[str, nn.Parameter]], weight_decay: float) -> list[dict[str, Any]]:
    """Matrices decay, vectors (norms, biases) do not."""
    matrices = [p for _, p in named if len(full_shape(p)) >= 2]
    vectors = [p for _, p in named if len(full_shape(p)) < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
