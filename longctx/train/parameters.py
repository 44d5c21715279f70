"""Which parameters of a model are trained, their full shapes, and how they are grouped for weight decay."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatch
from typing import Any

import torch
from torch import nn

from longctx.errors import UserError


def freeze(model: nn.Module, patterns: Iterable[str]) -> None:
    """Stop training the parameters whose names match a pattern such as `*embed_tokens*`.

    Raises UserError for a pattern that matches no parameter, and where nothing is left to train.
    """
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
    """The parameters that are trained, with their names, in the model's order."""
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def full_shape(parameter: torch.Tensor) -> torch.Size:
    """The parameter's shape, also where this rank holds only its ZeRO-3 share."""
    return getattr(parameter, "ds_shape", parameter.shape)


def decays(parameter: torch.Tensor) -> bool:
    """Whether weight decay applies to a parameter: to matrices, not to vectors (norms, biases)."""
    return len(full_shape(parameter)) >= 2


def decay_groups(named: Iterable[tuple[str, nn.Parameter]], weight_decay: float) -> list[dict[str, Any]]:
    """Optimizer groups: parameters that decay, and those that do not."""
    matrices = [p for _, p in named if decays(p)]
    vectors = [p for _, p in named if not decays(p)]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
