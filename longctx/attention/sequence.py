"""A layout as one rank sees it (`Layout`) and attention over it (`context_attention`).

Sharding is an index_select and so differentiable; un-sharding gathers every rank's part, drops the padding,
and its backward takes this rank's slice: each rank is expected to compute the same loss of the whole
sequence.

    B batch, H heads, S tokens of the sequence, n = S_local tokens of this rank (padding included), D head
    dimension
"""

from __future__ import annotations

import math
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from longctx.attention import op
from longctx.attention.prepared import Family
from longctx.attention.ulysses import check_heads
from longctx.layout import SequenceLayout

if TYPE_CHECKING:
    from longctx.attention.parallel import ContextParallel

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Layout:
    """This rank's tokens of one sequence. `arithmetic` answers for every other rank."""

    def __init__(self, family: Family, arithmetic: SequenceLayout, restart: bool) -> None:
        self.family, self.arithmetic, self.restart = family, arithmetic, restart
        family.prepare(arithmetic.boundaries, arithmetic)
        self.boundaries = torch.from_numpy(arithmetic.boundaries)

    @property
    def cp(self) -> ContextParallel:
        return self.family.cp

    @property
    def handle(self) -> int:
        return self.family.handle

    @property
    def seq_len(self) -> int:
        """S, without padding."""
        return self.arithmetic.seq_len

    @property
    def padded_len(self) -> int:
        return self.arithmetic.padded_len

    @property
    def local_len(self) -> int:
        """n, padding included; the same on every rank."""
        return self.arithmetic.rank_len

    @cached_property
    def indices(self) -> Tensor:
        """int64 [n]: where each local token stands in the sequence, -1 for padding (for data loading)."""
        return torch.from_numpy(self.arithmetic.indices(self.cp.rank))

    @property
    def valid(self) -> Tensor:
        """bool [n]: False for padding."""
        return self.indices >= 0

    @cached_property
    def positions(self) -> Tensor:
        """int64 [n]: RoPE positions, 0 for padding."""
        return torch.from_numpy(self.arithmetic.positions(self.cp.rank, restart=self.restart))

    @property
    def local_boundaries(self) -> Tensor:
        """int64 [d + 1]: cu_seqlens of the documents among the local tokens, padding excluded."""
        return torch.from_numpy(self.arithmetic.local_boundaries(self.cp.rank))

    @property
    def imbalance(self) -> float:
        """max / mean over ranks of the attention work; 1.0 is perfect."""
        return self.arithmetic.imbalance()

    def shard(self, x: Tensor, dim: int, fill: float | None = None) -> Tensor:
        """The local tokens of `x`, whose dimension `dim` is the whole sequence; differentiable.

        Padding is filled with `fill`; by default 0 for floats and bools, and for integers -100, which every
        loss ignores as a label: pass fill=0 (or a pad token) for token ids that are to be embedded.
        """
        if x.shape[dim] != self.seq_len:
            raise ValueError(f"x has {x.shape[dim]} tokens in dim={dim}, the layout's seq_len is {self.seq_len}")
        indices = self.indices.to(x.device)
        if self.arithmetic.padding:
            if fill is None:
                fill = 0 if x.dtype.is_floating_point or x.dtype == torch.bool else -100
            shape = list(x.shape)
            shape[dim] = 1
            x = torch.cat([x, x.new_full(shape, fill)], dim)
            indices = torch.where(indices < 0, self.seq_len, indices)
        return x.index_select(dim, indices)

    def unshard(self, x: Tensor, dim: int) -> Tensor:
        """Every rank's local tokens in sequence order, padding gone; the backward takes this rank's slice."""
        if x.shape[dim] != self.local_len:
            raise ValueError(f"x has {x.shape[dim]} tokens in dim={dim}, the layout's local_len is {self.local_len}")
        return _Unshard.apply(x, self, dim)  # type: ignore[return-value]

    def order(self) -> np.ndarray:
        """int64 [S]: where in the concatenation of all ranks' tokens each token of the sequence stands."""
        everyone = np.concatenate([self.arithmetic.indices(rank) for rank in range(self.cp.size)])
        return np.argsort(np.where(everyone < 0, self.padded_len, everyone), kind="stable")[: self.seq_len]


class _Unshard(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, layout: Layout, dim: int) -> Tensor:
        ctx.layout, ctx.dim = layout, dim
        whole = torch.cat(layout.cp.wire.all_gather(x.detach()), dim)
        return whole.index_select(dim, torch.from_numpy(layout.order()).to(x.device))

    @staticmethod
    def backward(ctx, *grads: Tensor):
        return ctx.layout.shard(grads[0], ctx.dim), None, None


def context_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: Layout,
    scale: float | None = None,
    return_lse: bool = False,
    attn_mask: None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Exact causal attention of this rank's queries with the whole sequence, within documents.

    q [B, Hq, n, D], k and v [B, Hkv, n, D], sharded by `layout`; `scale` defaults to 1 / sqrt(D). Returns
    out [B, Hq, n, D] in q's type and, if asked, lse [B, Hq, n] (natural logarithm, fp32, fp64 for fp64; not
    differentiable). Padding rows have out 0 and lse -inf. Every rank of the group must call it, and
    backward, in the same order. Raises ValueError naming argument, value and rule before anything is sent;
    PeerLost when a peer dies.
    """
    if attn_mask is not None or not isinstance(layout, Layout):
        raise ValueError(
            "a dense mask cannot be passed: attention is causal within documents, whose boundaries "
            "cp.layout(seq_len=..., documents=cu_seqlens) takes"
        )
    check_inputs(q, k, v, layout)
    scale = 1.0 / math.sqrt(q.shape[3]) if scale is None else float(scale)
    out, lse = op.attend(q, k, v, layout.boundaries, layout.handle, scale)
    if not return_lse:
        return out
    prepared = layout.family.prepare(layout.arithmetic.boundaries, layout.arithmetic)
    return out, prepared.local_lse(lse.detach(), q.shape[1])


def check_inputs(q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> None:
    """ValueError naming the argument, its value and the rule."""
    shapes = {"q": q, "k": k, "v": v}
    for name, x in shapes.items():
        if x.dim() != 4:
            raise ValueError(f"{name} has shape {tuple(x.shape)}: it must be [batch, heads, tokens, head_dim]")
        if x.shape[2] != layout.local_len:
            raise ValueError(
                f"{name} has {x.shape[2]} tokens, this rank's share of the layout has {layout.local_len}: "
                f"pass layout.shard({name}, dim=2)"
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
    if reason := layout.cp.wire.unsupported(q.device.type):
        raise ValueError(f"q, k, v are on {q.device}: {reason}")
    check_heads(layout.cp.ulysses, q.shape[1], k.shape[1])
