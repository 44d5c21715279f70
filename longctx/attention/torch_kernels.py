"""The kernels that come with torch: flash attention and cuDNN on a GPU, flash attention on a CPU.

The signatures are those of torch 2.11 to 2.13 (native_functions.yaml). cuDNN builds a plan for every new shape in every
thread, measured at 50 to 100 ms, so it takes only large blocks whose shape comes again.
"""

from __future__ import annotations

import itertools
from functools import lru_cache

import torch
from torch import Tensor

from longctx.attention.kernel import CallShape, Kernel, Lengths, Problem, Varlen, cuda_requirements

aten = torch.ops.aten
CUDNN_BLOCK = 1024  # the fewest queries and keys of a block for cuDNN, which refuses blocks of one token
# Tensors of as many elements and more take several backward calls: cuDNN's helper kernels take 32-bit sizes, and with
# 2^32 elements (1,048,576 tokens x 32 heads x 128, cuDNN 9.19) dq of six sampled rows was 5 % off, pooled. Neither
# the cause nor the cure has been verified on a GPU (docs/log.md).
CUDNN_SPAN = 2**31
CUDNN_STEP = 256  # lengths of packed documents for cuDNN are multiples of this, so that plans are few


def _no_dropout(q: Tensor) -> tuple[Tensor, Tensor]:
    """The random state that a backward takes as an argument and does not read without dropout."""
    if type(q) is not Tensor:  # a fake tensor, whose mode makes these too
        return _zeros.__wrapped__(q.device)
    return _zeros(q.device)


@lru_cache(maxsize=16)
def _zeros(device: torch.device) -> tuple[Tensor, Tensor]:
    """Kept, because two more launches for each block would let a GPU wait for the host."""
    with torch.inference_mode(False):
        return torch.zeros(2, dtype=torch.int64, device=device), torch.zeros((), dtype=torch.int64, device=device)


# --- torch's own flash attention, dense and packed


def _flash_forward(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    out, lse, *_ = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=scale)
    return out, lse


def _flash_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    seed, offset = _no_dropout(q)
    return aten._scaled_dot_product_flash_attention_backward(
        dout, q, k, v, out, lse.contiguous(), None, None, q.shape[2], k.shape[2], 0.0, causal, seed, offset, scale=scale
    )


def _packed_flash_forward(
    q: Tensor, k: Tensor, v: Tensor, at: Lengths, *, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    out, lse, *_ = aten._flash_attention_forward(
        q, k, v, at.cu_q, at.cu_k, at.max_q, at.max_k, 0.0, causal, False, scale=scale
    )
    return out, lse


def _packed_flash_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, at: Lengths, *, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    seed, offset = _no_dropout(q)
    return aten._flash_attention_backward(
        dout, q, k, v, out, lse.contiguous(), at.cu_q, at.cu_k, at.max_q, at.max_k, 0.0, causal, seed, offset,
        scale=scale,
    )  # fmt: skip


def _flash_reasons(problem: Problem) -> list[str]:
    reasons = cuda_requirements(problem)
    if problem.head_dim > 192 and (problem.capability in ((8, 6), (8, 9)) or problem.capability[0] == 12):
        reasons.append(f"its backward has no head dimension above 192 on this GPU, got {problem.head_dim}")
    return reasons


# --- cuDNN

_statistics_dims = [4]  # dimensions of the statistics that cuDNN's forward returned: [B, H, S, 1], or [B, H, S]


def _cudnn_forward(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    out, lse, *_ = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, causal, False, scale=scale)
    _statistics_dims[0] = lse.dim()
    return out, lse.reshape(q.shape[:3])


def _cudnn_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv; of large tensors for one KV head of one sequence and some of its query heads at a time."""
    if max(map(_span, (dout, q, k, v, out))) < CUDNN_SPAN:
        return _cudnn_backward_once(dout, q, k, v, out, lse, causal=causal, scale=scale)
    dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
    group = q.shape[1] // k.shape[1]
    heads = max(1, min(group, (CUDNN_SPAN - 1) // (q.shape[2] * q.shape[3])))
    for one, own in itertools.product(_singles(q.shape[0]), _singles(k.shape[1])):
        k_part, v_part = (_compact(x[one, own]) for x in (k, v))
        sums: list[Tensor] = []
        for first in range(own.start * group, own.stop * group, heads):
            queries = slice(first, min(first + heads, own.stop * group))
            dout_part, q_part, out_part = (_compact(x[one, queries]) for x in (dout, q, out))
            dq[one, queries], *found = _cudnn_backward_once(
                dout_part, q_part, k_part, v_part, out_part, lse[one, queries], causal=causal, scale=scale
            )
            sums = [total.float() + part for total, part in zip(sums, found, strict=True)] if sums else found
        dk[one, own], dv[one, own] = sums
    return dq, dk, dv


def _singles(count: int) -> list[slice]:
    return [slice(index, index + 1) for index in range(count)]


def _span(x: Tensor) -> int:
    """The elements from the first to the last of x in memory."""
    return 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))


def _compact(x: Tensor) -> Tensor:
    """x [B, H, S, D] without gaps in memory, tokens before heads."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _cudnn_backward_once(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    seed, offset = _no_dropout(q)
    # The backward takes the statistics in the shape in which the forward of the same torch returns them.
    statistics = lse.contiguous().reshape(*q.shape[:3], *(1,) * (_statistics_dims[0] - 3))
    return aten._scaled_dot_product_cudnn_attention_backward(
        dout, q, k, v, out, statistics, seed, offset, None, None, None, q.shape[2], k.shape[2], 0.0, causal, scale=scale
    )


def _cudnn_reasons(problem: Problem) -> list[str]:
    reasons = cuda_requirements(problem, head_dims=128)
    if problem.device == "cuda" and not torch.backends.cudnn.is_available():
        reasons.append("this torch has no cuDNN")
    return reasons


def _cudnn_refuses(shape: CallShape) -> str | None:
    if min(shape.queries, shape.keys) < CUDNN_BLOCK:
        return f"takes blocks of {CUDNN_BLOCK:,} queries and keys or more"
    if not shape.recurring and (shape.queries % CUDNN_STEP or shape.keys % CUDNN_STEP):
        return f"builds a plan per shape, so it takes packed documents only in multiples of {CUDNN_STEP} tokens"
    return None


# --- torch's CPU flash attention


def _cpu_forward(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)


def _cpu_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return aten._scaled_dot_product_flash_attention_for_cpu_backward(dout, q, k, v, out, lse, 0.0, causal, scale=scale)


def _cpu_reasons(problem: Problem) -> list[str]:
    return [f"needs CPU tensors, got {problem.device}"] if problem.device != "cpu" else []


CUDNN = Kernel("cudnn", _cudnn_forward, _cudnn_backward, _cudnn_reasons, _cudnn_refuses)
TORCH_FLASH = Kernel(
    "torch_flash", _flash_forward, _flash_backward, _flash_reasons,
    varlen=Varlen(_packed_flash_forward, _packed_flash_backward),
)  # fmt: skip
TORCH_CPU = Kernel("torch_cpu", _cpu_forward, _cpu_backward, _cpu_reasons)
