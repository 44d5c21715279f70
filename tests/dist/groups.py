"""The functions that test_groups.py runs on ranks: errors before transfers, subgroups, DDP, a dead peer."""

from __future__ import annotations

import os
import time

import torch
import torch.distributed as dist
from torch import nn

from longctx.attention import ContextParallel, PeerLost, context_attention
from tests.dist.parity import TOLERANCE, oracle


def check(rank: int, world: int, case: str) -> None:
    CASES[case](rank, world)


def bad_input_raises_on_every_rank(rank: int, world: int) -> None:
    """Every rank raises ValueError, and the ring still works afterwards, because no transfer was posted."""
    cp = ContextParallel.from_world()
    layout = cp.layout(seq_len=32)
    x = torch.randn(1, 4, layout.local_len, 8)
    wrong = [
        lambda: cp.layout(seq_len=2 * world - 1),
        lambda: cp.layout(seq_len=32, documents=[0, 9, 4, 32]),
        lambda: cp.layout(seq_len=32, documents=[0, 30]),
        lambda: context_attention(x, x[:, :3], x[:, :3], layout),
        lambda: context_attention(x, x.double(), x, layout),
        lambda: context_attention(x[:, :, 1:], x, x, layout),
        lambda: ContextParallel.from_world(nodes=3),
        lambda: ContextParallel.from_world(schedule="ulysses_ring", ulysses=3),
    ]
    for call in wrong:
        try:
            call()
        except ValueError:
            continue
        raise AssertionError("no ValueError")
    assert cp.bytes.per_level() == {"inner": 0, "outer": 0}
    assert cp.transport.unsupported("cpu") is None
    assert "gloo sends CPU tensors only" in (cp.transport.unsupported("cuda") or "")
    context_attention(x, x, x, layout)
    cp.close()


def data_parallel_groups(rank: int, world: int) -> None:
    """dp x cp: each pair of ranks is its own ring, by group and by mesh, and equals the oracle."""
    mesh = dist.init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("dp", "cp"))
    for cp in (
        ContextParallel.from_mesh(mesh, schedule="double_ring", nodes=2),
        ContextParallel.from_world(group=mesh.get_group("cp")),
    ):
        assert (cp.size, cp.rank) == (2, rank % 2)
        layout = cp.layout(seq_len=61)
        x = oracle(61, None, 8, 2)
        q, k, v = (layout.shard(x[name], dim=2) for name in "qkv")
        out = layout.unshard(context_attention(q, k, v, layout), dim=2)
        assert (out - x["out"]).abs().max() < TOLERANCE
        cp.close()


def closed_and_opened_again(rank: int, world: int) -> None:
    """Layouts change between stages: contexts of any schedule are opened and closed beside others that stay open."""
    x = oracle(64, None, 8, 8)
    stays = ContextParallel.from_world(schedule="double_ring", nodes=2)
    for schedule in ("flat_ring", "ulysses_ring", "double_ring", "flat_ring"):
        cp = ContextParallel.from_world(schedule=schedule, nodes=2)
        for one in (cp, stays):
            layout = one.layout(seq_len=64)
            q, k, v = (layout.shard(x[name], dim=2) for name in "qkv")
            assert (layout.unshard(context_attention(q, k, v, layout), 2) - x["out"]).abs().max() < TOLERANCE
        cp.close()
    stays.close()


def inside_ddp(rank: int, world: int) -> None:
    """Gradients under DDP, whose hooks reduce while the ring's backward runs, equal those of one process."""
    torch.manual_seed(0)
    size, heads = 64, 4
    layers = nn.ModuleList(nn.Linear(32, 96, dtype=torch.float64) for _ in range(3))
    whole = torch.randn(1, size, 32, dtype=torch.float64)

    class Model(nn.Module):
        def __init__(self, layout) -> None:
            super().__init__()
            self.layers, self.layout = layers, layout

        def forward(self, x):
            for layer in self.layers:
                q, k, v = (y.unflatten(-1, (heads, 8)).transpose(1, 2) for y in layer(x).chunk(3, -1))
                x = x + context_attention(q, k, v, self.layout).transpose(1, 2).flatten(2)
            return x

    cp = ContextParallel.from_world(schedule="double_ring", nodes=2)
    layout = cp.layout(seq_len=size)
    model = nn.parallel.DistributedDataParallel(Model(layout), bucket_cap_mb=0.001)
    for _ in range(2):
        model.zero_grad()
        (model(layout.shard(whole, dim=1)) * layout.shard(whole, dim=1)).sum().backward()
    found = [p.grad * world for p in layers.parameters()]  # DDP averages
    for p in layers.parameters():
        p.grad = None
    alone = ContextParallel(*solo())
    one = Model(alone.layout(seq_len=size))
    (one(whole) * whole).sum().backward()
    for got, p in zip(found, layers.parameters(), strict=True):
        assert (got - p.grad).abs().max() < 1e-9
    cp.close()


def solo():
    from longctx.distributed.transport import SingleRankTransport
    from longctx.topology import Topology

    return SingleRankTransport(), Topology()


def peer_dies(rank: int, world: int) -> None:
    """The last rank dies between two calls; the others raise PeerLost naming hop and peer in time."""
    cp = ContextParallel.from_world(timeout=5)
    layout = cp.layout(seq_len=64)
    x = torch.randn(1, 4, layout.local_len, 8)
    context_attention(x, x, x, layout)
    if rank == world - 1:
        os._exit(0)
    begin = time.monotonic()
    try:
        for _ in range(3):
            context_attention(x, x, x, layout)
    except PeerLost as error:
        text = str(error)
        assert "flat_ring forward, hop" in text, text
        assert "rank " + str(rank) in text
        assert "from rank" in text
        assert time.monotonic() - begin < 20
    else:
        raise AssertionError("a dead peer went unnoticed")


CASES = {
    case.__name__: case
    for case in (
        bad_input_raises_on_every_rank,
        data_parallel_groups,
        closed_and_opened_again,
        inside_ddp,
        peer_dies,
    )
}
