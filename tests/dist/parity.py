"""The parity cases: a schedule on real ranks against dense attention in fp64 in one process."""

from __future__ import annotations

from functools import lru_cache
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from longctx.attention import ContextParallel, context_attention
from longctx.schedule import SCHEDULES, Sizes

HEAD_DIM, BATCH = 8, 2
TOLERANCE = 1e-10


class Case(NamedTuple):
    nodes: int
    schedule: str
    ulysses: int | None
    kind: str
    seq_len: int
    documents: tuple[int, ...] | None
    q_heads: int
    kv_heads: int


HEADS = ((8, 8), (8, 2), (8, 1))


def cases(world: int, *, every: bool = True) -> list[Case]:
    """Every (M, W), schedule, GQA ratio and sequence variant.

    every=False: each (M, W) and schedule meets each sequence variant once, and each GQA ratio with one or two of them.
    """
    found: list[Case] = []
    for nodes in (m for m in (1, 2, 4, 8) if world % m == 0):
        for schedule in SCHEDULES:
            local = world // nodes
            heads = [h for h in (2, 4, 8) if local % h == 0] if schedule == "ulysses_ring" else []
            for ulysses in heads or [None]:
                turn = len(found) // len(variants_of_sequence())
                for heads_index, (number, (kind, seq_len, documents)) in product(
                    range(len(HEADS)), enumerate(variants_of_sequence())
                ):
                    if every or heads_index == (turn + number) % len(HEADS):
                        found.append(Case(nodes, schedule, ulysses, kind, seq_len, documents, *HEADS[heads_index]))
    return found


def variants_of_sequence() -> list[tuple[str, int, tuple[int, ...] | None]]:
    """One document, packed documents, uneven lengths; 64 divides by every N, 61 by none."""
    return [
        ("zigzag", 64, None),
        ("zigzag", 61, (0, 7, 20, 21, 50, 61)),
        ("contiguous", 61, (0, 3, 61)),
        ("documents", 64, (0, 32, 36, 40, 41, 50, 64)),
    ]


@lru_cache(maxsize=32)
def oracle(seq_len: int, documents: tuple[int, ...] | None, q_heads: int, kv_heads: int) -> dict[str, Tensor]:
    """q, k, v, dout and dense attention's out, lse, dq, dk, dv in fp64."""
    make = torch.Generator().manual_seed(seq_len + 100 * kv_heads)
    shapes = {"q": q_heads, "k": kv_heads, "v": kv_heads, "dout": q_heads}
    x = {
        name: torch.randn(BATCH, heads, seq_len, HEAD_DIM, generator=make, dtype=torch.float64)
        for name, heads in shapes.items()
    }
    q, k, v = (x[name].clone().requires_grad_() for name in "qkv")
    group = q_heads // kv_heads
    edges = torch.tensor(documents or (0, seq_len))
    doc = torch.searchsorted(edges, torch.arange(seq_len), right=True)
    seen = (doc[:, None] == doc) & torch.ones(seq_len, seq_len, dtype=torch.bool).tril()
    scores = q @ k.repeat_interleave(group, 1).transpose(2, 3) / HEAD_DIM**0.5
    scores = scores.masked_fill(~seen, float("-inf"))
    x["lse"] = scores.logsumexp(-1).detach()
    out = scores.softmax(-1) @ v.repeat_interleave(group, 1)
    x["dq"], x["dk"], x["dv"] = torch.autograd.grad(out, (q, k, v), x["dout"])
    x["out"] = out.detach()
    return x


@lru_cache(maxsize=4)
def context(nodes: int, schedule: str, ulysses: int | None) -> ContextParallel:
    return ContextParallel.from_world(nodes=nodes, schedule=schedule, ulysses=ulysses, timeout=300)


def check(rank: int, world: int, case: Case) -> None:
    """Compare out, lse, dq, dk, dv of this rank within 1e-10, the bytes with the plan, and the un-sharded result."""
    cp = context(case.nodes, case.schedule, case.ulysses)
    layout = cp.layout(seq_len=case.seq_len, documents=list(case.documents) if case.documents else None, kind=case.kind)
    x = oracle(case.seq_len, case.documents, case.q_heads, case.kv_heads)
    q, k, v = (layout.shard(x[name], dim=2).requires_grad_() for name in "qkv")
    cp.bytes.reset()
    out, lse = context_attention(q, k, v, layout, return_lse=True)
    out.backward(layout.shard(x["dout"], dim=2))
    real = layout.valid
    found = {"out": out, "lse": lse, "dq": q.grad, "dk": k.grad, "dv": v.grad}
    for name, got in found.items():
        error = (got[:, :, real] - layout.shard(x[name], dim=2)[:, :, real]).abs().max().item()
        assert error < TOLERANCE, f"{name} differs by {error}"
    for name in ("dq", "dk", "dv"):
        assert not found[name][:, :, ~real].any(), f"{name} of padding is not zero"
    whole = layout.unshard(out.detach(), dim=2)
    assert torch.equal(whole[:, :, layout.indices[real]], out[:, :, real])
    assert (whole - x["out"]).abs().max() < TOLERANCE
    check_bytes(cp, layout, case)


def check_bytes(cp: ContextParallel, layout, case: Case) -> None:
    """Compare the counted bytes with the schedules' sums, plus the exchange of lse when Ulysses is asked for lse."""
    sizes = Sizes(layout.local_len, case.q_heads, case.kv_heads, HEAD_DIM, BATCH, 8, 8)
    schedules = layout.cache.prepare(layout.arithmetic.boundaries).schedules
    total = sum(sum(schedule.bytes(sizes).values()) for schedule in schedules)
    h = cp.ulysses
    total += (h - 1) * BATCH * layout.local_len * (case.q_heads // h) * 8
    assert sum(cp.bytes.per_level().values()) == total
