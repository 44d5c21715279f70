"""The reference kernel: plain attention in any floating type, the oracle of the other kernels and a slow fallback.

It takes rows of queries in blocks, so that memory stays bounded. Gradients follow FlashAttention-2 (2307.08691,
equations 12 to 17) from the given *global* out and lse, so a ring can call it block by block.

Shapes: q [B, Hq, Sq, D], k and v [B, Hkv, Sk, D], lse [B, Hq, Sq] (natural logarithm), G = Hq / Hkv.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROWS = 1024


def _scores(q: Tensor, k: Tensor, start: int, causal: bool, scale: float) -> Tensor:
    """Scaled scores [B, Hkv, G, rows, Sk] of the query rows that begin at `start`."""
    scores = torch.einsum("bhgsd,bhtd->bhgst", q, k) * scale
    if causal:
        rows = torch.arange(start, start + q.shape[3], device=q.device)
        hidden = torch.arange(k.shape[2], device=q.device) > rows[:, None]
        scores.masked_fill_(hidden, float("-inf"))
    return scores


def _grouped(x: Tensor, kv_heads: int) -> Tensor:
    """Split the heads by KV head, in at least fp32: [B, Hq, S, D] -> [B, Hkv, G, S, D]."""
    x = x if x.dtype == torch.float64 else x.float()
    return x.unflatten(1, (kv_heads, -1))


def forward(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """Attend from q to k and v; returns out in q's type and lse in fp32 (fp64 for fp64 inputs)."""
    heads = k.shape[1]
    queries, keys, values = _grouped(q, heads), _grouped(k, heads)[:, :, 0], _grouped(v, heads)[:, :, 0]
    outs, sums = [], []
    for start in range(0, q.shape[2], ROWS):
        scores = _scores(queries[:, :, :, start : start + ROWS], keys, start, causal, scale)
        lse = scores.logsumexp(-1)
        outs.append(torch.einsum("bhgst,bhtd->bhgsd", (scores - lse[..., None]).exp(), values))
        sums.append(lse)
    return torch.cat(outs, 3).flatten(1, 2).to(q.dtype), torch.cat(sums, 3).flatten(1, 2)


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients dq, dk and dv of this block, from the global out and lse."""
    heads = k.shape[1]
    queries, keys, values = _grouped(q, heads), _grouped(k, heads)[:, :, 0], _grouped(v, heads)[:, :, 0]
    grads, outs = _grouped(dout, heads), _grouped(out, heads)
    sums = lse.to(queries.dtype).unflatten(1, (heads, -1))
    delta = (grads * outs).sum(-1)
    dq, dk, dv = torch.empty_like(queries), torch.zeros_like(keys), torch.zeros_like(values)
    for start in range(0, q.shape[2], ROWS):
        rows = slice(start, start + ROWS)
        scores = _scores(queries[:, :, :, rows], keys, start, causal, scale)
        p = (scores - sums[:, :, :, rows, None]).exp()
        dv += torch.einsum("bhgst,bhgsd->bhtd", p, grads[:, :, :, rows])
        dp = torch.einsum("bhgsd,bhtd->bhgst", grads[:, :, :, rows], values)
        ds = p * (dp - delta[:, :, :, rows, None]) * scale
        dq[:, :, :, rows] = torch.einsum("bhgst,bhtd->bhgsd", ds, keys)
        dk += torch.einsum("bhgst,bhgsd->bhtd", ds, queries[:, :, :, rows])
    return dq.flatten(1, 2).to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)
