"""One layer's attention at 2^20 tokens on one GPU, forward and backward, with sampled rows compared with fp64.

Shapes: S tokens, H query heads, K kv heads, D head dimension, R sampled rows.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longctx.attention import ContextParallel, context_attention
from longctx.attention.kernels import choose, problem_of
from longctx.distributed.transport import SingleRankTransport
from longctx.topology import Topology


def main(
    path: str, tokens: int = 2**20, heads: int = 32, kv_heads: int = 8, dim: int = 128, device: str = "cuda"
) -> None:
    """Measure, compare and write the result to `path`."""
    make = torch.Generator(device=device).manual_seed(1)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32

    def drawn(count: int) -> Tensor:
        shape = (1, tokens, count, dim)
        return torch.randn(shape, generator=make, device=device, dtype=dtype).transpose(1, 2)

    q, k, v, dout = (drawn(count) for count in (heads, kv_heads, kv_heads, heads))
    # cuDNN's calls are cut into pieces at this length, and this is where the pieces are tested.
    kernel = "cudnn" if device == "cuda" else None
    cp = ContextParallel(SingleRankTransport(), Topology(), kernel=kernel)
    layout = cp.layout(seq_len=tokens)
    for leaf in (q, k, v):
        leaf.requires_grad_()
    wait(device)
    began = time.perf_counter()
    found: Any = context_attention(q, k, v, layout, return_lse=True)
    out, lse = found
    out.backward(dout)
    wait(device)
    seconds = time.perf_counter() - began
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else 0
    with torch.no_grad():
        by_row = sampled_errors(out, lse, q, k, v, dout)
    errors = {name: max(found.values()) for name, found in by_row.items()}
    result = {
        "tokens": tokens,
        "seconds": seconds,
        "tflops": 7.0 * heads * dim * float(tokens) ** 2 / seconds / 1e12,
        "peak_gib": peak / 2**30,
        "kernel": choose(problem_of(q, k), kernel).name,
        "errors": errors,
        "error": max(errors.values()),
        "by_row": by_row,
    }
    Path(path).write_text(json.dumps(result), encoding="utf-8")
    print(json.dumps(result))


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def sampled_errors(
    out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, dout: Tensor
) -> dict[str, dict[int, float]]:
    """Errors of out, lse and dq at sampled queries and of dk and dv at sampled keys, by name and row.

    The RMS error of a row is divided by its own RMS: the first rows' gradients are hundreds of times larger than the
    last ones'. dq of the first query is zero, so its error is divided by the largest row's RMS, and an lse near zero
    counts as 1.
    The query heads of one kv head are compared in fp64. Queries and keys are sampled at the same places; what a key
    receives from all queries is formed from the measured lse, which is compared itself at the sampled queries.
    """
    tokens, group, scale = q.shape[2], q.shape[1] // k.shape[1], q.shape[3] ** -0.5
    rows = torch.tensor(sorted({0, 1, tokens // 3, tokens // 2 + 1, tokens - 2, tokens - 1}), device=q.device)
    found: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in ("out", "lse", "dq", "dk", "dv")}
    keys, values = k[0, 0].double(), v[0, 0].double()
    seen = torch.arange(tokens, device=q.device)[:, None] >= rows[None, :]
    dk, dv = torch.zeros_like(keys[rows]), torch.zeros_like(values[rows])
    for head in range(group):
        queries, grad = q[0, head].double(), dout[0, head].double()
        want = _rows(queries[rows], keys, values, grad[rows], rows, scale)
        got = (out[0, head, rows], lse[0, head, rows], _grad(q)[0, head, rows])
        for name, a, b in zip(("out", "lse", "dq"), got, want, strict=True):
            found[name].append((a, b))
        delta = (grad * out[0, head].double()).sum(-1)
        scores = queries @ keys[rows].T * scale
        p = torch.where(seen, (scores - lse[0, head].double()[:, None]).exp(), 0.0)
        dv += p.T @ grad
        dk += (p * (grad @ values[rows].T - delta[:, None]) * scale).T @ queries
    found["dk"].append((_grad(k)[0, 0, rows], dk))
    found["dv"].append((_grad(v)[0, 0, rows], dv))
    return {
        name: dict(zip(rows.tolist(), _by_row(name, *map(torch.stack, zip(*pairs, strict=True))), strict=True))
        for name, pairs in found.items()
    }


def _by_row(name: str, got: Tensor, want: Tensor) -> list[float]:
    """The relative error of each row; [heads, R] or [heads, R, D]."""
    got, want = (x.double().unsqueeze(-1).flatten(2) for x in (got, want))
    error, size = (x.square().mean((0, 2)).sqrt() for x in (got - want, want))
    if name == "lse":
        size = size.clamp_min(1.0)
    if name == "dq":
        size[0] = size.max()
    return (error / size).tolist()


def _grad(x: Tensor) -> Tensor:
    assert x.grad is not None
    return x.grad


def _rows(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, rows: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """out, lse and dq of R queries [R, D] at positions `rows` over all keys [S, D]."""
    scores = (q @ k.T) * scale
    scores = scores.masked_fill(torch.arange(len(k), device=k.device)[None, :] > rows[:, None], float("-inf"))
    lse = scores.logsumexp(-1)
    p = (scores - lse[:, None]).exp()
    out = p @ v
    ds = p * (dout @ v.T - (dout * out).sum(-1, keepdim=True)) * scale
    return out, lse, ds @ k


if __name__ == "__main__":
    main(sys.argv[1])
