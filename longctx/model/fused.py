"""The element-wise operators of a step on a GPU, by candidate: `model.memory.fused` says which.

`off` is torch's operators, one launch each, and the only one on a CPU and for fp64. `liger` calls liger-kernel's Triton
kernels, `compile` puts the formulas of `off` through torch.compile. A candidate computes the same in another order of
roundings: norm and activation save what `off` saves (the input and one number per row; gate and up), and the loss's
softmax becomes its gradient in place. docs/benchmarks.md has how they are compared; until that is done, auto is off.

Shapes: N rows, E the normed dimension, B batch, S tokens, H heads, D head dim, F feed-forward, C tokens of a chunk, V
vocabulary.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from longctx.config.model import Fused
from longctx.errors import UserError

log = logging.getLogger("longctx.model")
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


def norm_backward(grad: Tensor, x: Tensor, factor: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """dx [N, E] and the sum dw [E] of rows; factor: the weight (plus 1 for Gemma) in scale's dtype, as is dw."""
    grad = grad.to(scale.dtype)
    normed = x.to(scale.dtype) * scale
    dw = (grad * normed).sum(0)
    grad = grad * factor
    return ((grad - normed * (grad * normed).mean(-1, keepdim=True)) * scale).to(x.dtype), dw


def liger_norm(x: Tensor, weight: Tensor, eps: float, gemma: bool) -> Tensor:
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction  # type: ignore[import-not-found]

    offset, casting = (1.0, "gemma") if gemma else (0.0, "llama")
    return LigerRMSNormFunction.apply(x, weight, eps, offset, casting, True)


# --- rotation


def liger_rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """q and k [B, S, H, D] -> [B, H, S, D]; copied first, because liger turns them in place and products are kept."""
    from liger_kernel.ops.rope import LigerRopeFunction  # type: ignore[import-not-found]

    return LigerRopeFunction.apply(q.clone().transpose(1, 2), k.clone().transpose(1, 2), cos, sin)


# --- the gated activation


def feed_forward(fused: Fused, mlp: Any, x: Tensor) -> Tensor:
    """The feed-forward block of a decoder layer; transformers' own module where no candidate serves its activation."""
    candidate, kind = chosen(fused, x), type(mlp.act_fn).__name__
    gelu = kind in ("GELUTanh", "PytorchGELUTanh")
    if candidate == "off" or not (gelu or kind in ("SiLU", "SiLUActivation")):
        return mlp(x)
    gate, up = mlp.gate_proj(x), mlp.up_proj(x)
    if candidate == "compile":
        return mlp.down_proj(_Gated.apply(gate, up, gelu))
    from liger_kernel.ops.geglu import LigerGELUMulFunction  # type: ignore[import-not-found]
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction  # type: ignore[import-not-found]

    return mlp.down_proj((LigerGELUMulFunction if gelu else LigerSiLUMulFunction).apply(gate, up))


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


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a @ b to total, which may be wider; the product itself adds in fp32 where torch can (on a GPU)."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    elif _adds_inside(total.device, a.dtype):
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total += a @ b


@lru_cache(maxsize=8)
def _adds_inside(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch.addmm adds a product of `dtype` to an fp32 tensor on this device; tried once, on ones."""
    if device.type != "cuda":
        return False
    total, ones = torch.ones(16, 16, device=device), torch.ones(16, 16, device=device, dtype=dtype)
    try:
        torch.addmm(total, ones, ones, out_dtype=torch.float32, out=total)
    except RuntimeError as error:  # what torch raises where a device has no such product
        log.warning("torch cannot add a product in fp32 here (%s); the head's gradient is added afterwards", error)
        return False
    return bool((total == 17).all())
