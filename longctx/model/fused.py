"""liger-kernel's Triton kernels for the element-wise work of a step on a GPU; longctx.model.operators chooses them.

One launch of such a kernel reads and writes a tensor once, where torch's operators do it three to nine times
(docs/benchmarks.md has the bytes). Norm and activation save what torch's operators save here (the input and one number
per row; gate and up), and the loss's softmax becomes its gradient in place. They round in another order than torch's.

Shapes: N rows, E the normed dimension, B batch, S tokens, H heads, D head dim, F feed-forward, C tokens of a chunk, V
vocabulary.
"""

from __future__ import annotations

import os
from typing import Any, Literal

import torch
from torch import Tensor

from longctx.model.products import added, main_grad

Operators = Literal["torch", "liger"]


def able(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether liger-kernel's kernels take tensors of this device and dtype; Triton's interpreter makes a CPU a GPU."""
    return dtype != torch.float64 and (device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1")


class LigerNorm(torch.autograd.Function):
    """Computes s = x + addend (or x) and its RMSNorm, [N, E]; the arguments of longctx.model.norms.norm_of_sum."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, addend: Tensor | None, weight: Tensor, eps: float, gemma: bool
    ) -> tuple[Tensor, Tensor]:
        from liger_kernel.ops.fused_add_rms_norm import (  # type: ignore[import-not-found]
            fused_add_rms_norm_forward,
        )
        from liger_kernel.ops.rms_norm import rms_norm_forward  # type: ignore[import-not-found]

        ctx.offset, casting = (1.0, "gemma") if gemma else (0.0, "llama")
        ctx.main = main_grad(weight)
        ctx.set_materialize_grads(False)
        if addend is None:
            out, _, scale, ctx.block, ctx.warps, ctx.casting = rms_norm_forward(
                x, weight, eps, ctx.offset, casting, None
            )
            total = x
        else:
            out, total, scale, ctx.block, ctx.warps, _, ctx.casting = fused_add_rms_norm_forward(
                x, addend, weight, eps, ctx.offset, casting
            )
        ctx.save_for_backward(total, weight, scale)
        return total, out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        passed, out_grad = grads
        from liger_kernel.ops.fused_add_rms_norm import (  # type: ignore[import-not-found]
            fused_add_rms_norm_backward,
        )
        from liger_kernel.ops.rms_norm import rms_norm_backward  # type: ignore[import-not-found]

        dx, dw = passed, None
        if out_grad is not None:
            settings = (*ctx.saved_tensors, ctx.offset, ctx.casting, ctx.block, ctx.warps)
            out_grad = out_grad.contiguous()
            if passed is None:
                dx, dw = rms_norm_backward(out_grad, *settings, True, None, ctx.needs_input_grad[2])
            else:
                stages = 2  # of the loads' pipeline, as liger-kernel's forward pass returns it
                dx, _, dw = fused_add_rms_norm_backward(
                    out_grad, passed.contiguous(), *settings, stages, True, ctx.needs_input_grad[2]
                )
        return dx, dx if ctx.needs_input_grad[1] else None, added(dw, ctx.main), None, None


def liger_rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate q and k [B, S, H, D] in place -> [B, H, S, D]."""
    from liger_kernel.ops.rope import LigerRopeFunction  # type: ignore[import-not-found]

    return LigerRopeFunction.apply(q.transpose(1, 2), k.transpose(1, 2), cos, sin)


def liger_gated(gate: Tensor, up: Tensor, gelu: bool) -> Tensor:
    """act(gate) * up [B, S, F], by SiLU or by GELU's tanh form; the backward pass writes over gate and up."""
    from liger_kernel.ops.geglu import LigerGELUMulFunction  # type: ignore[import-not-found]
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction  # type: ignore[import-not-found]

    out = (LigerGELUMulFunction if gelu else LigerSiLUMulFunction).apply(gate, up)
    if out.grad_fn is not None:
        out.grad_fn.register_hook(_overwritten)
    return out


def _overwritten(gradients: tuple[Tensor | None, ...], _: Any) -> None:
    """Tell autograd that these gradients lie where saved tensors lay, which it does not see of a Triton kernel.

    A second backward pass through the same graph then raises, instead of taking gradients for gate and up.
    """
    for gradient in gradients:
        if gradient is not None:
            torch.autograd.graph.increment_version(gradient)


def liger_loss(logits: Tensor, label: Tensor, z_loss: float) -> tuple[Tensor, Tensor]:
    """nll [C] and lse^2 [C] in fp32; writes the unweighted gradient of nll + z lse^2 [C, V] over the logits."""
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
    return nll - z, z / z_loss if z_loss else z
