"""Full recomputation on ranks: the repeated attention repeats its communication, under every schedule and engine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from longctx.attention import ContextParallel
from longctx.config.model import InitConfig, MemoryConfig
from longctx.model import LossModel, init_from
from tests.dist.ranks import run_ranks

from .parity import Case, check
from .test_parity import told

SHAPE = InitConfig(layers=2, hidden=32, heads=4, kv_heads=2, ffn=48, vocab=64, window=64, seed=7)


@dataclass(frozen=True)
class Ring:
    schedule: str
    nodes: int
    ulysses: int | None = None


RINGS = [Ring("flat_ring", 1), Ring("double_ring", 2), Ring("allgather_ring", 2), Ring("ulysses_ring", 2, 2)]


def check_bits(rank: int, world: int, ring: Ring) -> None:
    """The gradients of two packed documents are the bits that selective recomputation gives."""
    found = []
    for keep in (True, False):
        context = ContextParallel.from_world(ring.nodes, ring.schedule, ring.ulysses)  # type: ignore[arg-type]
        model = LossModel(init_from(SHAPE), MemoryConfig(keep_attention=keep, ffn_block=8, loss_chunk=8))
        layout = context.layout(seq_len=64, documents=[0, 23, 64])
        ids = torch.randint(64, (1, 64), generator=torch.Generator().manual_seed(1))
        local, labels = layout.shard(ids, dim=1), layout.shard(ids.roll(-1, 1), dim=1)
        for _ in range(2):  # the second adds to the first
            model(local, layout.positions, labels, layout=layout).loss_sum.backward()
        found.append([parameter.grad for parameter in model.parameters()])
        context.close()
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_every_schedule_gives_the_bits_of_selective_recomputation(tmp_path: Path) -> None:
    failures = run_ranks(4, check_bits, RINGS, tmp_path / "store")
    assert not failures, "\n".join(f"{ring}: {text[0]}" for ring, text in failures.items())


def test_a_step_under_full_recomputation_equals_one_process(tmp_path: Path) -> None:
    cases = [Case(cp=2, accumulation=3, full=True), Case(cp=2, zero=3, accumulation=2, full=True)]
    failures = run_ranks(2, check, cases, tmp_path / "store")
    assert not failures, told(failures)
