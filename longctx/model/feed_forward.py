"""The feed-forward block of a decoder layer: down(act(gate(x)) * up(x)).

Shapes: B batch, S tokens, E hidden size, F feed-forward size.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor

from longctx.model.fused import Operators, liger_gated
from longctx.model.products import BlockSums, project

_SILU, _GELU = ("SiLU", "SiLUActivation"), ("GELUTanh", "PytorchGELUTanh")  # transformers' classes


def feed_forward(
    operators: Operators,
    mlp: Any,
    x: Tensor,
    sums: BlockSums,
    *,
    kept: AbstractContextManager[Any],
    compute: bool = True,
) -> Tensor:
    """x [B, S, E], a block of those of `sums` -> [B, S, E].

    kept: the context for the products gate and up. compute=False saves what the backward pass needs without the last
    product; the result is then of no use.
    """
    with kept:
        gate, up = project(x, mlp.gate_proj, mlp.up_proj, sums=sums)
    (out,) = project(activated(operators, mlp, gate, up), mlp.down_proj, sums=sums, compute=compute)
    return out


def activated(operators: Operators, mlp: Any, gate: Tensor, up: Tensor) -> Tensor:
    """act(gate) * up [B, S, F]; by torch's operators where liger-kernel lacks the activation."""
    kind = type(mlp.act_fn).__name__
    if operators == "liger" and kind in (*_SILU, *_GELU):
        return liger_gated(gate, up, kind in _GELU)
    return mlp.act_fn(gate) * up
