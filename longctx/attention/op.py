"""Context attention as a `torch.library` op, which selective checkpointing can save and torch.compile can pass over.

An op cannot take a process group, so a table maps an integer handle to an `AttentionRunner`, and closing a
ContextParallel removes its entries. Boundaries travel as a tensor, because an int list would recompile for every batch.
The backward is an op too. The forward's outputs are out and lse, so a checkpoint that saves the outputs of `SAVED_OPS`
runs the attention forward once per step.
"""

from __future__ import annotations

from itertools import count
from typing import Protocol

import torch
from torch import Tensor


class AttentionRunner(Protocol):
    """Runs the attention of one rank; the op finds it by its handle."""

    def run_forward(
        self, q: Tensor, k: Tensor, v: Tensor, boundaries: Tensor, scale: float
    ) -> tuple[Tensor, Tensor]: ...

    def run_backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        boundaries: Tensor,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]: ...

    def lse_shape(self, q: Tensor) -> tuple[int, int, int]: ...


_TABLE: dict[int, AttentionRunner] = {}
_NUMBERS = count(1)


def enter(runner: AttentionRunner) -> int:
    """Put a runner into the table; returns its handle."""
    handle = next(_NUMBERS)
    _TABLE[handle] = runner
    return handle


def leave(handle: int) -> None:
    _TABLE.pop(handle, None)


def _find(handle: int) -> AttentionRunner:
    if handle not in _TABLE:
        raise ValueError(f"layout handle {handle} is closed: its ContextParallel was closed before this call")
    return _TABLE[handle]


@torch.library.custom_op("longctx::context_attention", mutates_args=())
def attend(q: Tensor, k: Tensor, v: Tensor, boundaries: Tensor, handle: int, scale: float) -> tuple[Tensor, Tensor]:
    """Return out [B, Hq, n, D], with the strides of `empty_like(q)`, and lse (gathered by heads under Ulysses)."""
    return _find(handle).run_forward(q, k, v, boundaries, scale)


@attend.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, boundaries: Tensor, handle: int, scale: float) -> tuple[Tensor, Tensor]:
    kind = torch.float64 if q.dtype == torch.float64 else torch.float32
    return torch.empty_like(q), q.new_empty(_find(handle).lse_shape(q), dtype=kind)


@torch.library.custom_op("longctx::context_attention_backward", mutates_args=())
def differentiate(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    boundaries: Tensor,
    handle: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dq, dk and dv in the types and strides of q, k and v."""
    return _find(handle).run_backward(dout, q, k, v, out, lse, boundaries, scale)


@differentiate.register_fake
def _(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    boundaries: Tensor,
    handle: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _setup(ctx, inputs, output) -> None:
    q, k, v, boundaries, handle, scale = inputs
    out, lse = output
    ctx.save_for_backward(q, k, v, out, lse, boundaries)
    ctx.handle, ctx.scale = handle, scale
    ctx.set_materialize_grads(False)


def _backward(ctx, dout: Tensor | None, dlse: Tensor | None):
    if dlse is not None:
        raise ValueError("lse is not differentiable: detach it before using it in a loss")
    q, k, v, out, lse, boundaries = ctx.saved_tensors
    if dout is None:  # no gradient reaches out, but the peers still wait for this rank's transfers
        dout = torch.zeros_like(out)
    elif dout.stride(3) != 1:  # of a sum over heads' dimensions, say
        dout = dout.contiguous()
    dq, dk, dv = differentiate(dout, q, k, v, out, lse, boundaries, ctx.handle, ctx.scale)
    return dq, dk, dv, None, None, None


attend.register_autograd(_backward, setup_context=_setup)

SAVED_OPS = (torch.ops.longctx.context_attention.default,)
