"""The functions that the NCCL tests run on ranks of one card: parity of schedules, and peers that die or hang."""

from __future__ import annotations

import os
import time

import torch
import torch.distributed as dist

from longctx.attention import ContextParallel, context_attention
from longctx.attention.kernels import KERNELS
from tests.dist.parity import Case, oracle
from tests.gpu.card import CARD, DTYPE, ON_CUDA, wait


def check_parity(rank: int, world: int, case: Case) -> None:
    """out, lse, dq, dk, dv of this rank in fp64 within 1e-9 of dense attention, over NCCL."""
    cp = ContextParallel.from_world(nodes=case.nodes, schedule=case.schedule, ulysses=case.ulysses, timeout=60)
    documents = list(case.documents) if case.documents else None
    layout = cp.layout(seq_len=case.seq_len, documents=documents, kind=case.kind)
    x = {name: value.to(CARD) for name, value in oracle(*case[4:]).items()}
    q, k, v = (layout.shard(x[name], dim=2).requires_grad_() for name in "qkv")
    out, lse = context_attention(q, k, v, layout, return_lse=True)
    out.backward(layout.shard(x["dout"], dim=2))
    real = layout.valid.to(CARD)
    for name, got in {"out": out, "lse": lse, "dq": q.grad, "dk": k.grad, "dv": v.grad}.items():
        error = (got[:, :, real] - layout.shard(x[name], dim=2)[:, :, real]).abs().max().item()
        assert error < 1e-9, f"{name} differs by {error}"
    assert (layout.unshard(out.detach(), dim=2) - x["out"]).abs().max() < 1e-9
    cp.close()


def check_bfloat16(rank: int, world: int, case: Case) -> None:
    """The same in bf16: at most 1.25 of the error that one kernel makes alone, over the whole sequence."""
    make = torch.Generator(device=CARD).manual_seed(5)
    shapes = {"q": case.q_heads, "k": case.kv_heads, "v": case.kv_heads, "dout": case.q_heads}
    x = {
        name: torch.randn(1, heads, case.seq_len, 64, generator=make, device=CARD).to(DTYPE)
        for name, heads in shapes.items()
    }
    kernel, plain = KERNELS["torch_flash" if ON_CUDA else "torch_cpu"], KERNELS["reference"]

    def alone(one, cast):
        q, k, v, dout = (cast(x[name]) for name in ("q", "k", "v", "dout"))
        out, lse = one.forward(q, k, v, causal=True, scale=0.125)
        return [out, *one.backward(dout, q, k, v, out, lse, causal=True, scale=0.125)]

    want, single = alone(plain, torch.Tensor.double), alone(kernel, lambda one: one)
    cp = ContextParallel.from_world(nodes=case.nodes, schedule=case.schedule, ulysses=case.ulysses, timeout=60)
    layout = cp.layout(seq_len=case.seq_len, kind=case.kind)
    q, k, v = (layout.shard(x[name], dim=2).requires_grad_() for name in "qkv")
    out = context_attention(q, k, v, layout)
    out.backward(layout.shard(x["dout"], dim=2))
    got = [layout.unshard(one.detach().contiguous(), dim=2) for one in (out, q.grad, k.grad, v.grad)]
    for name, a, b, c in zip(("out", "dq", "dk", "dv"), got, want, single, strict=True):
        mine, theirs = ((one.double() - b).square().mean().sqrt().item() for one in (a, c))
        assert mine <= 1.25 * theirs, f"{name}: {mine} beside {theirs} of one kernel"
    cp.close()


def check_many_steps(rank: int, world: int, case: int) -> None:
    """`case` steps of packed random documents: neither the device's memory nor the layouts' cache grow."""
    cp = ContextParallel.from_world(timeout=60)
    make = torch.Generator().manual_seed(7)
    seen: list[int] = []
    for step in range(case):
        cuts = torch.randint(1, 4096, (1 + step % 9,), generator=make).unique().tolist()
        layout = cp.layout(seq_len=4096, documents=[0, *cuts, 4096])
        q, k, v = (
            torch.randn(1, heads, layout.local_len, 64, device=CARD, dtype=DTYPE, requires_grad=True)
            for heads in (4, 2, 2)
        )
        context_attention(q, k, v, layout).sum().backward()
        if step in (case // 3, case - 1):
            wait()
            seen.append(torch.cuda.memory_reserved() if ON_CUDA else 0)
    assert seen[1] <= 1.1 * seen[0] + 2**24, seen
    cp.close()


def check_lost_peer(rank: int, world: int, case: str) -> None:
    """The last rank dies or hangs between two calls; the others must end within the transfers' timeout."""
    cp = ContextParallel.from_world(timeout=10)
    layout = cp.layout(seq_len=256)
    x = torch.randn(1, 4, layout.local_len, 64, device=CARD, dtype=DTYPE)
    context_attention(x, x, x, layout)
    wait()
    if rank == world - 1:
        if case == "dies":
            os._exit(3)
        time.sleep(300)
    context_attention(x, x, x, layout)
    wait()  # NCCL's watchdog ends the process: no Python error reaches it
    dist.barrier()
