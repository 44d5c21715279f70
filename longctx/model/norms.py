"""RMSNorm that saves only its input and one number per row, and computes in fp32, or in fp64 for fp64 models.

transformers' RMSNorm saves two more tensors of the hidden size for the backward pass and always rounds to fp32. An fp64
model is then an oracle to 1e-8 at best; with this norm it is one to 1e-10.

Shapes: N rows (batch x tokens, x heads for Qwen3's q and k), E the normed dimension.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from longctx.config.model import Fused
from longctx.model.fused import chosen, compiled, liger_norm, norm_backward, norm_forward

_ROWS = 1024  # of a block on a CPU, whose caches hold it
_ELEMENTS = 1 << 26  # of a block on a GPU: few launches, and fp32 temporaries of at most 256 MiB


class TrainedNorm:
    """The forward that `train_norms` mixes into an architecture's RMSNorm; same values, fewer saved tensors.

    fused: the candidate on a GPU (longctx.model.fused).
    """

    fused: Fused = "auto"

    def forward(self, hidden_states: Tensor) -> Tensor:
        module: Any = self
        gemma = type(self).__name__.startswith("TrainedGemma")
        eps = module.eps if gemma else module.variance_epsilon
        flat = hidden_states.reshape(-1, hidden_states.shape[-1])
        candidate = chosen(self.fused, flat)
        if candidate == "liger":
            return liger_norm(flat, module.weight, eps, gemma).view(hidden_states.shape)
        return _RmsNorm.apply(flat, module.weight, eps, gemma, candidate == "compile").view(hidden_states.shape)


class _RmsNorm(torch.autograd.Function):
    """Computes y = x / rms(x) * w (Zhang & Sennrich 1910.07467, eq. 4); Gemma multiplies by 1 + w before rounding."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, gemma: bool, compile: bool) -> Tensor:
        wide = _wide(x.dtype)
        ctx.gemma, ctx.compile = gemma, compile
        if compile:
            out, scale = compiled(norm_forward)(x, weight, eps, gemma, wide)
            ctx.save_for_backward(x, weight, scale)
            return out
        out = torch.empty_like(x)
        scale = torch.empty(len(x), 1, dtype=wide, device=x.device)
        for rows in _blocks(x):
            out[rows], scale[rows] = norm_forward(x[rows], weight, eps, gemma, wide)
        ctx.save_for_backward(x, weight, scale)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        wide = scale.dtype
        factor = weight.to(wide) + 1.0 if ctx.gemma else weight.to(wide)
        if ctx.compile:
            dx, dw = compiled(norm_backward)(grads[0], x, factor, scale)
            return dx, dw.to(weight.dtype), None, None, None
        dx = torch.empty_like(x)
        dw = torch.zeros_like(factor) if ctx.needs_input_grad[1] else None
        for rows in _blocks(x):
            grad, rms = grads[0][rows].to(wide), scale[rows]
            normed = x[rows].to(wide) * rms
            if dw is not None:
                dw += (grad * normed).sum(0)
            grad = grad * factor
            dx[rows] = (grad - normed * (grad * normed).mean(-1, keepdim=True)) * rms
        return dx, None if dw is None else dw.to(weight.dtype), None, None, None


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _blocks(x: Tensor) -> list[slice]:
    rows = _ROWS if x.device.type == "cpu" else max(1, _ELEMENTS // x.shape[1])
    return [slice(start, start + rows) for start in range(0, len(x), rows)]


def train_norms(model: nn.Module) -> None:
    """Make every RMSNorm of `model` a TrainedNorm, in place; modules and parameter names do not change."""
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm") and not isinstance(module, TrainedNorm):
            module.__class__ = _trained(type(module))


@cache
def _trained(norm: type) -> type:
    return type(f"Trained{norm.__name__}", (TrainedNorm, norm), {})
