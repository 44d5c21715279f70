"""RMSNorm that saves only its input and one number per row, and computes in fp32, or in fp64 for fp64 models.

transformers' RMSNorm saves two more tensors of the hidden size for the backward pass and always rounds to fp32. An fp64
model is then an oracle to 1e-8 at best; with this norm it is one to 1e-10.

Shapes: N rows (batch x tokens, x heads for Qwen3's q and k), E the normed dimension.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from longctx.model.fused import LigerNorm, Operators, able
from longctx.model.mixin import Mixin
from longctx.model.products import added, is_bare, main_grad

_ROWS = 1024  # of a block on a CPU, whose caches hold it
_ELEMENTS = 1 << 26  # of a block on a GPU: few launches, and fp32 temporaries of at most 256 MiB


class TrainedNorm(Mixin):
    """The forward that `prepare_norms` mixes into an architecture's RMSNorm; same values, fewer saved tensors.

    operators: whose code runs where it can (longctx.model.fused).
    """

    operators: Operators = "torch"

    @property
    def gemma(self) -> bool:
        """Whether the weight is an offset from 1, as Gemma's is; FSDP2 gives a norm that it shards another class."""
        return any(base.__name__.startswith("Gemma") for base in type(self).__mro__)

    @property
    def epsilon(self) -> float:
        module: Any = self
        return module.eps if self.gemma else module.variance_epsilon

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.of_sum(hidden_states)[1]

    def of_sum(self, x: Tensor, addend: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x + addend (or x), all [..., E], and its norm.

        A residual stream that goes on from the first of the two has its gradient added by the norm's backward pass.
        """
        flat = x.reshape(-1, x.shape[-1])
        other = None if addend is None else addend.reshape(flat.shape).to(flat.dtype)
        weight: Any = self.weight  # type: ignore[attr-defined]
        operators = self.operators if able(x.device, x.dtype) else "torch"  # a plain forward may run elsewhere
        total, normed = norm_of_sum(operators, flat, other, weight, self.epsilon, self.gemma)
        return total.view(x.shape), normed.view(x.shape)


def sum_and_norm(norm: nn.Module, x: Tensor, addend: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """x + addend (or x), all [..., E], and its norm; anything but a bare TrainedNorm is called on the sum."""
    if isinstance(norm, TrainedNorm) and is_bare(norm):
        return norm.of_sum(x, addend)
    total = x if addend is None else x + addend
    return total, norm(total)


def norm_of_sum(
    operators: Operators, x: Tensor, addend: Tensor | None, weight: Tensor, eps: float, gemma: bool
) -> tuple[Tensor, Tensor]:
    """s = x + addend (or x) [N, E] and y = s / rms(s) * w (Zhang & Sennrich 1910.07467, eq. 4).

    gemma: y = s / rms(s) * (1 + w), rounded after the product.
    """
    return (LigerNorm if operators == "liger" else _RmsNorm).apply(x, addend, weight, eps, gemma)


class _RmsNorm(torch.autograd.Function):
    """norm_of_sum by torch's operators, in blocks of rows."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, addend: Tensor | None, weight: Tensor, eps: float, gemma: bool
    ) -> tuple[Tensor, Tensor]:
        wide = _wide(x.dtype)
        ctx.gemma, ctx.main = gemma, main_grad(weight)
        ctx.set_materialize_grads(False)
        total = x if addend is None else x + addend
        out = torch.empty_like(total)
        scale = torch.empty(len(x), 1, dtype=wide, device=x.device)
        for rows in _blocks(x):
            part = total[rows].to(wide)
            scale[rows] = torch.rsqrt(part.square().mean(-1, keepdim=True) + eps)
            normed = part * scale[rows]
            out[rows] = normed * (1.0 + weight.to(wide)) if gemma else weight * normed.to(x.dtype)
        ctx.save_for_backward(total, weight, scale)
        return total, out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        passed, out_grad = grads
        x, weight, scale = ctx.saved_tensors
        wide = scale.dtype
        if out_grad is None:
            return passed, passed if ctx.needs_input_grad[1] else None, None, None, None
        factor = weight.to(wide) + 1.0 if ctx.gemma else weight.to(wide)
        dx = torch.empty_like(x)
        dw = torch.zeros_like(factor) if ctx.needs_input_grad[2] else None
        for rows in _blocks(x):
            grad, rms = out_grad[rows].to(wide), scale[rows]
            normed = x[rows].to(wide) * rms
            if dw is not None:
                dw += (grad * normed).sum(0)
            grad = grad * factor
            grad = (grad - normed * (grad * normed).mean(-1, keepdim=True)) * rms
            dx[rows] = grad if passed is None else grad + passed[rows]
        dw = added(dw, ctx.main)
        return dx, dx if ctx.needs_input_grad[1] else None, None if dw is None else dw.to(weight.dtype), None, None


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _blocks(x: Tensor) -> list[slice]:
    rows = _ROWS if x.device.type == "cpu" else max(1, _ELEMENTS // x.shape[1])
    return [slice(start, start + rows) for start in range(0, len(x), rows)]


def prepare_norms(model: nn.Module) -> None:
    """Make every RMSNorm of `model` a TrainedNorm, in place; modules and parameter names do not change."""
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            TrainedNorm.into(module)
