"""The element-wise operators of a step on a GPU, by candidate: `model.memory.fused` says which.

`off` is torch's operators, one launch each, and the only one on a CPU and for fp64. `liger` calls liger-kernel's Triton
kernels, `compile` puts the formulas of `off` through torch.compile. A candidate computes the same in another order of
roundings: norm and activation save what `off` saves (the input and one number per row; gate and up), and the loss's
softmax becomes its gradient in place. docs/benchmarks.md has how they are compared; until that is done, auto is off.

Shapes: N rows, E the normed dimension, B batch, S tokens, H heads, D head dim, F feed-forward, C tokens of a chunk, V
vocabulary.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from longctx.config.model import Fused
from longctx.errors import UserError
from longctx.model.products import BlockSums, project

BACKEND = "inductor"  # of torch.compile


def chosen(fused: Fused, x: Tensor) -> str:
    """The candidate that serves x: off, liger or compile."""
    on_gpu = x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"
    return fused if fused != "auto" and on_gpu and x.dtype != torch.float64 else "off"


def check_installed(fused: Fused) -> None:
    """Raise UserError where the candidate's package is missing."""
    from importlib.util import find_spec

    if fused == "liger" and find_spec("liger_kernel") is None:
        raise UserError(
            "model.memory.fused=liger needs the package liger-kernel, which is not installed; install longctx[gpu], or "
            "take compile or off (configs/model)"
        )


@cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function under torch.compile, whose lengths may change from call to call.

    torch compiles nothing while a dispatch mode is active, as those of selective checkpointing are (and leaves a
    function that it met there uncompiled for good), so modes are set aside; they look for attention and products only.
    """
    made = torch.compile(function, dynamic=True, backend=BACKEND)

    def call(*args: Any) -> Any:
        with _disable_current_modes():
            return made(*args)

    return call


# --- RMSNorm


def norm_forward(x: Tensor, weight: Tensor, eps: float, gemma: bool, wide: torch.dtype) -> tuple[Tensor, Tensor]:
    """y = x / rms(x) * w of rows x [N, E], and 1 / rms [N, 1] in `wide`."""
    part = x.to(wide)
    scale = torch.rsqrt(part.square().mean(-1, keepdim=True) + eps)
    normed = part * scale
    return (normed * (1.0 + weight.to(wide))).to(x.dtype) if gemma else weight * normed.to(x.dtype), scale


def sum_norm_forward(
    x: Tensor, addend: Tensor, weight: Tensor, eps: float, gemma: bool, wide: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """x + addend [N, E], its norm y, and 1 / rms [N, 1]."""
    total = x + addend
    return total, *norm_forward(total, weight, eps, gemma, wide)


def norm_backward(
    grad: Tensor, x: Tensor, factor: Tensor, scale: Tensor, passed: Tensor | None
) -> tuple[Tensor, Tensor]:
    """dx [N, E] and the sum dw [E] of rows.

    factor: the weight (plus 1 for Gemma) in scale's dtype, as is dw. passed: a gradient of x to add.
    """
    grad = grad.to(scale.dtype)
    normed = x.to(scale.dtype) * scale
    dw = (grad * normed).sum(0)
    grad = grad * factor
    dx = (grad - normed * (grad * normed).mean(-1, keepdim=True)) * scale
    return (dx if passed is None else dx + passed).to(x.dtype), dw


def liger_norm(x: Tensor, addend: Tensor | None, weight: Tensor, eps: float, gemma: bool) -> tuple[Tensor, Tensor]:
    """x + addend (or x) and its norm; both [N, E]."""
    from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction  # type: ignore[import-not-found]
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction  # type: ignore[import-not-found]

    options = (weight, eps, *((1.0, "gemma") if gemma else (0.0, "llama")), True)
    if addend is None:
        return x, LigerRMSNormFunction.apply(x, *options)
    normed, total = LigerFusedAddRMSNormFunction.apply(x, addend, *options)
    return total, normed


# --- rotation


def liger_rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """q and k [B, S, H, D] -> [B, H, S, D]; copied first, because liger turns them in place and products are kept."""
    from liger_kernel.ops.rope import LigerRopeFunction  # type: ignore[import-not-found]

    return LigerRopeFunction.apply(q.clone().transpose(1, 2), k.clone().transpose(1, 2), cos, sin)


# --- the gated activation


def feed_forward(fused: Fused, mlp: Any, x: Tensor, sums: BlockSums, *, compute: bool = True) -> Tensor:
    """The feed-forward block of a decoder layer: down(act(gate(x)) * up(x)), x [B, S, E].

    compute=False saves what the backward pass needs without the last product; the result is then of no use.
    """
    gate, up = project(x, mlp.gate_proj, mlp.up_proj, sums=sums)
    (out,) = project(_activated(fused, mlp, gate, up), mlp.down_proj, sums=sums, compute=compute)
    return out


def _activated(fused: Fused, mlp: Any, gate: Tensor, up: Tensor) -> Tensor:
    """act(gate) * up [B, S, F]; by torch's operators where no candidate has the activation."""
    candidate, kind = chosen(fused, gate), type(mlp.act_fn).__name__
    gelu = kind in ("GELUTanh", "PytorchGELUTanh")
    if candidate == "off" or not (gelu or kind in ("SiLU", "SiLUActivation")):
        return mlp.act_fn(gate) * up
    if candidate == "compile":
        return _Gated.apply(gate, up, gelu)
    from liger_kernel.ops.geglu import LigerGELUMulFunction  # type: ignore[import-not-found]
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction  # type: ignore[import-not-found]

    return (LigerGELUMulFunction if gelu else LigerSiLUMulFunction).apply(gate, up)


def gated(gate: Tensor, up: Tensor, gelu: bool) -> Tensor:
    """act(gate) * up [N, F]."""
    acted = nn.functional.gelu(gate, approximate="tanh") if gelu else nn.functional.silu(gate)
    return acted * up


def gated_backward(grad: Tensor, gate: Tensor, up: Tensor, gelu: bool) -> tuple[Tensor, Tensor]:
    """The gradients of gate and up, through the activation computed again in fp32."""
    wide, dy = gate.float(), grad.float()
    if gelu:
        inner = 0.7978845608028654 * (wide + 0.044715 * wide.pow(3))
        tanh = torch.tanh(inner)
        slope = 0.5 * (1 + tanh) + 0.5 * wide * (1 - tanh * tanh) * 0.7978845608028654 * (1 + 0.134145 * wide * wide)
        acted = 0.5 * wide * (1 + tanh)
    else:
        sigmoid = torch.sigmoid(wide)
        acted, slope = wide * sigmoid, sigmoid * (1 + wide * (1 - sigmoid))
    return (dy * up.float() * slope).to(gate.dtype), (dy * acted).to(up.dtype)


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, gelu: bool) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.gelu = gelu
        return compiled(gated)(gate, up, gelu)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return *compiled(gated_backward)(grads[0], *ctx.saved_tensors, ctx.gelu), None


# --- the loss


def softmax_loss(candidate: str, logits: Tensor, label: Tensor, z_loss: float) -> tuple[Tensor, Tensor, Tensor]:
    """nll [C] and lse^2 [C] in fp32, and the unweighted gradient of nll + z lse^2 [C, V] in the logits' dtype.

    candidate: liger, which writes the gradient over the logits, or compile.
    """
    if candidate == "compile":
        return compiled(_softmax_loss)(logits, label, z_loss)
    from liger_kernel.ops import cross_entropy as liger  # type: ignore[import-not-found]

    nll, z = (torch.zeros(len(logits), device=logits.device) for _ in range(2))
    # The kernel itself: liger's function around it waits for the device and keeps losses in bf16.
    liger.liger_cross_entropy_kernel[(len(logits),)](
        X_ptr=logits, X_stride=logits.stride(0), Y_ptr=label, Y_stride=label.stride(0), weight_ptr=None, loss_ptr=nll,
        z_loss_ptr=z, loss_stride=1, token_accuracy_ptr=None, token_accuracy_stride=0, predicted_tokens_ptr=None,
        predicted_tokens_stride=0, n_cols=logits.shape[1], n_non_ignore=len(logits),
        sum_non_ignore_weight=len(logits), ignore_index=-100, weight_sum=0.0, lse_square_scale=z_loss,
        label_smoothing=0.0, reduction="none", softcap=None, RETURN_Z_LOSS=True, RETURN_TOKEN_ACCURACY=False,
        RETURN_PREDICTED_TOKENS=False, BLOCK_SIZE=min(32768, 1 << (logits.shape[1] - 1).bit_length()), HAS_WEIGHT=False,
        HAS_SOFTCAPPING=False, HAS_GRADIENTS=True, num_warps=32,
    )  # fmt: skip
    return nll - z, z / z_loss if z_loss else z, logits


def _softmax_loss(logits: Tensor, label: Tensor, z_loss: float) -> tuple[Tensor, Tensor, Tensor]:
    wide = logits.float()
    lse = wide.logsumexp(-1, keepdim=True)
    nll = lse - wide.gather(-1, label[:, None])
    columns = torch.arange(logits.shape[1], device=logits.device)
    gradient = (wide - lse).exp() * (1 + 2 * z_loss * lse) - (columns == label[:, None]).float()
    return nll.squeeze(-1), lse.square().squeeze(-1), gradient.to(logits.dtype)
