"""The function `context_attention`, which checks its inputs and runs the attention of this rank under a layout.

Shapes: B batch, H heads, n tokens of this rank (padding included), D head dimension.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from longctx.attention import op
from longctx.attention.local_layout import Layout
from longctx.attention.ulysses import check_heads

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def context_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: Layout,
    scale: float | None = None,
    return_lse: bool = False,
    attn_mask: None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Exact causal attention of this rank's queries to the whole sequence, within documents.

    q [B, Hq, n, D], k and v [B, Hkv, n, D] are sharded by `layout`. `scale` defaults to 1 / sqrt(D). Returns
    out [B, Hq, n, D] in q's type and, with return_lse, lse [B, Hq, n]: the natural logarithm of the softmax's
    denominator in fp32 (fp64 for fp64), which is not differentiable. Padding rows have out 0 and lse -inf. Every rank
    of the group must make the same calls, and their backwards, in the same order. Raises ValueError, which names
    argument, value and rule, before anything is sent, and PeerLost when a peer dies.

    >>> import longctx, torch
    >>> layout = longctx.ContextParallel.from_world().layout(seq_len=64)
    >>> q, k, v = (layout.shard(torch.randn(1, heads, 64, 16), dim=2) for heads in (4, 2, 2))
    >>> out, lse = longctx.context_attention(q, k, v, layout, return_lse=True)
    >>> out.shape, lse.shape
    (torch.Size([1, 4, 64, 16]), torch.Size([1, 4, 64]))
    """
    if attn_mask is not None or not isinstance(layout, Layout):
        raise ValueError(
            "a dense mask cannot be passed: attention is causal within documents, whose boundaries "
            "cp.layout(seq_len=..., documents=cu_seqlens) takes"
        )
    check_inputs(q, k, v, layout)
    scale = 1.0 / math.sqrt(q.shape[3]) if scale is None else float(scale)
    if not 0 < scale <= 1e15:
        raise ValueError(f"scale={scale:g} is not a number above 0 and up to 1e15; leave it out for 1 / sqrt(head_dim)")
    # Kernels read the last dimension as contiguous; torch's on a CPU does not check it and reads other memory.
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    out, lse = op.attend(q, k, v, layout.boundaries, layout.handle, scale)
    if not return_lse:
        return out
    attention = layout.cache.prepare(layout.arithmetic.boundaries, layout.arithmetic)
    return out, attention.local_lse(lse.detach(), q.shape[1])


def check_inputs(q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> None:
    """Raise ValueError, which names the argument, its value and the rule, when the inputs do not fit the layout."""
    shapes = {"q": q, "k": k, "v": v}
    for name, x in shapes.items():
        if x.dim() != 4:
            raise ValueError(f"{name} has shape {tuple(x.shape)}: it must be [batch, heads, tokens, head_dim]")
        if x.shape[2] != layout.local_len:
            raise ValueError(
                f"{name} has {x.shape[2]} tokens, this rank's share of the layout has {layout.local_len}: pass "
                f"layout.shard({name}, dim=2)"
            )
        if x.dtype not in FLOATS:
            raise ValueError(f"{name} is {x.dtype}: attention takes fp16, bf16, fp32 or fp64")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k, v are {q.dtype}, {k.dtype}, {v.dtype}: they must have one dtype")
    if not q.device == k.device == v.device:
        raise ValueError(f"q, k, v are on {q.device}, {k.device}, {v.device}: they must be on one device")
    if k.shape != v.shape:
        raise ValueError(f"k has shape {tuple(k.shape)} and v {tuple(v.shape)}: they must be equal")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"q has shape {tuple(q.shape)} and k {tuple(k.shape)}: batch and head_dim must be equal")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"q has {q.shape[1]} heads, k has {k.shape[1]}: the kv heads must divide the query heads")
    if reason := layout.cp.transport.unsupported(q.device.type):
        raise ValueError(f"q, k, v are on {q.device}: {reason}")
    check_heads(layout.cp.ulysses, q.shape[1], k.shape[1])
