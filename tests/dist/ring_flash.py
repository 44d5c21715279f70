"""The functions that test_ring_flash.py runs on ranks: the package's zigzag ring beside longctx's, and what both send.

Tensors are [B, H, S, D]; the package takes and gives [B, S, H, D].
"""

from __future__ import annotations

import sys
from typing import NamedTuple

import torch
from torch import Tensor

from longctx.attention import ContextParallel, context_attention
from longctx.attention.kernels import KERNELS
from longctx.bench.ring_flash import counted, zigzag
from tests.dist.parity import TOLERANCE, oracle

NAMES = ("out", "dq", "dk", "dv")


class Heads(NamedTuple):
    query: int
    kv: int
    kernel: str
    device: str = "cpu"


class Sent(NamedTuple):
    """A row of the table in docs/benchmarks.md: KV blocks that a rank sends, and tensors in which it does."""

    nodes: int
    ring: str
    forward: int
    backward: int
    tensors: int
    between_nodes: int  # by the rank of a node that sends most


def extract_local(value: Tensor, rank: int, world: int, dim: int) -> Tensor:
    """The tokens of `rank`, as the package's own test of its zigzag ring takes them."""
    chunks = value.chunk(2 * world, dim=dim)
    return torch.cat([chunks[rank], chunks[2 * world - rank - 1]], dim=dim)


def longctx_ring(layout, q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    out = context_attention(*leaves, layout)
    out.backward(dout)
    return [out.detach(), *(x.grad for x in leaves)]


def package_ring(kernel: str, q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> tuple[list[Tensor], Tensor]:
    """The results, and lse [B, H, S]."""
    leaves = [x.detach().transpose(1, 2).contiguous().requires_grad_() for x in (q, k, v)]
    out, lse, _ = zigzag(KERNELS[kernel])(*leaves, causal=True, return_attn_probs=True)
    out.backward(dout.transpose(1, 2))
    return [x.transpose(1, 2) for x in (out.detach(), *(x.grad for x in leaves))], lse


def check_parity(rank: int, world: int, case: Heads) -> None:
    """Both rings beside dense attention in fp64: longctx within 1e-10, the package, which adds up in fp32, 2e-6."""
    x = {name: value.to(case.device) for name, value in oracle(64, None, case.query, case.kv).items()}
    cp = ContextParallel.from_world(kernel=case.kernel, timeout=60)
    layout = cp.layout(seq_len=64)
    inputs = [layout.shard(x[name], dim=2) for name in ("q", "k", "v", "dout")]
    assert torch.equal(inputs[0], extract_local(x["q"], rank, world, dim=2)), "the layouts differ"
    ours, (package, lse) = longctx_ring(layout, *inputs), package_ring(case.kernel, *inputs)
    for name, a, b in zip(NAMES, ours, package, strict=True):
        want = layout.shard(x[name], dim=2)
        assert a.dtype == b.dtype == torch.float64
        assert (a - want).abs().max() < TOLERANCE, f"{name} of longctx"
        assert (b - want).abs().max() < 2e-6, f"{name} of the package"
    assert (lse - layout.shard(x["lse"], dim=2)).abs().max() < 2e-6
    assert not [name for name in sys.modules if name.startswith("ring_flash_attn")]
    cp.close()


def check_bfloat16(rank: int, world: int, case: int) -> None:
    """In bf16, on the same kernel, longctx errs at most 1.05 times as much as the package."""
    make = torch.Generator().manual_seed(3)
    x = [torch.randn(1, heads, case, 64, generator=make).bfloat16() for heads in (8, 2, 2, 8)]
    *leaves, dout = (one.double() for one in x)
    plain, options = KERNELS["reference"], {"causal": True, "scale": 64**-0.5}
    out, lse = plain.forward(*leaves, **options)
    exact = [out, *plain.backward(dout, *leaves, out, lse, **options)]
    cp = ContextParallel.from_world(kernel="torch_cpu", timeout=60)
    layout = cp.layout(seq_len=case)
    inputs = [layout.shard(one, dim=2) for one in x]
    ours, (package, _) = longctx_ring(layout, *inputs), package_ring("torch_cpu", *inputs)
    for name, a, b, want in zip(NAMES, ours, package, exact, strict=True):
        mine, theirs = ((one.double() - layout.shard(want, dim=2)).square().mean().sqrt() for one in (a, b))
        assert mine < 1.05 * theirs, f"{name}: {mine} beside {theirs} of the package"
    cp.close()


def check_sent(rank: int, world: int, case: Sent) -> None:
    """What this rank sends in bf16, in units of its own KV block, is the row of the table."""
    make = torch.Generator().manual_seed(rank)
    q, k, v = (torch.randn(1, heads, 16, 8, generator=make).bfloat16() for heads in (4, 2, 2))
    if case.ring == "ring_flash_attn":
        q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))
        attend = zigzag(KERNELS["reference"])
        options: dict = {"causal": True}
    else:
        cp = ContextParallel.from_world(nodes=case.nodes, schedule=case.ring, timeout=60)
        attend, options = context_attention, {"layout": cp.layout(seq_len=16 * world)}
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    with counted() as forward:
        out = attend(q, k, v, **options)
    with counted() as backward:
        out.sum().backward()
    block, ranks = k.nbytes + v.nbytes, world // case.nodes
    assert forward.bytes == case.forward * block, forward.bytes / block
    assert backward.bytes == case.backward * block, backward.bytes / block
    sent = forward.sent + backward.sent
    assert len(sent) == case.tensors, len(sent)
    outside = sum(size for to, size in sent if to // ranks != rank // ranks)
    last = case.ring == "double_ring" or rank % ranks == ranks - 1  # a flat ring leaves a node through its last rank
    assert outside == (case.between_nodes * block if last else 0), outside / block
