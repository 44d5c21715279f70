"""NCCL with several ranks on one card: every schedule, training steps under every engine, peers that die or hang."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest
import torch

from longctx.bench import ring_flash
from longctx.distributed.ranks import shared_gpu
from tests.dist import parity
from tests.dist.ranks import run_ranks
from tests.dist.ring_flash import Heads
from tests.dist.ring_flash import check_parity as check_both_rings
from tests.gpu.card import CARD, KIND, ON_CUDA
from tests.gpu.nccl import check_bfloat16, check_lost_peer, check_many_steps, check_parity
from tests.train.parity import Case, check

ZIGZAG = ("zigzag", 61, (0, 7, 20, 21, 50, 61))


def schedules(world: int) -> list[parity.Case]:
    """Every schedule and number of nodes once, with packed documents and a length that no number of ranks divides."""
    return [case for case in parity.cases(world) if case[3:6] == ZIGZAG and case[6:] == (8, 2)]


@pytest.mark.parametrize("world", [2, 4])
def test_every_schedule_equals_dense_attention(tmp_path: Path, world: int) -> None:
    assert len({case.schedule for case in schedules(world)}) == 4
    assert not run_ranks(world, check_parity, schedules(world), tmp_path / "store", timeout=150, nccl=ON_CUDA)


@pytest.mark.parametrize("world", [2, 4])
def test_bfloat16_errs_as_one_kernel_does(tmp_path: Path, world: int) -> None:
    length = 2048 if ON_CUDA else 256
    cases = [case._replace(kind="zigzag", seq_len=length, documents=None) for case in schedules(world)]
    assert not run_ranks(world, check_bfloat16, cases, tmp_path / "store", timeout=150, nccl=ON_CUDA)


@pytest.mark.skipif(ring_flash.missing() is not None, reason=str(ring_flash.missing()))
@pytest.mark.parametrize("world", [2, 4])
def test_ring_flash_attn_gives_the_same_on_the_same_ranks(tmp_path: Path, world: int) -> None:
    cases = [Heads(8, kv, "reference", KIND) for kv in (8, 2)]
    assert not run_ranks(world, check_both_rings, cases, tmp_path / "store", timeout=150, nccl=ON_CUDA)


ENGINES = {
    "ddp": [Case(cp=2), Case(cp=1, dtype="float64", variant="mute"), Case(cp=2, dtype="float64", accumulation=3)],
    "zero1": [Case(cp=2, zero=1)],
    "zero2": [Case(cp=2, zero=2, accumulation=3)],
    "zero3": [Case(cp=2, zero=3, variant="frozen")],
}


@pytest.mark.parametrize("cases", ENGINES.values(), ids=ENGINES.keys())
def test_a_training_step_equals_one_process(tmp_path: Path, cases: list[Case]) -> None:
    failures = run_ranks(2, check, cases, tmp_path / "store", timeout=150, nccl=ON_CUDA)
    assert not failures, failures


def test_three_hundred_steps_of_packed_documents_do_not_grow(tmp_path: Path) -> None:
    assert not run_ranks(2, check_many_steps, [300], tmp_path / "store", timeout=200, nccl=ON_CUDA)


@pytest.mark.parametrize("case", ["dies", "hangs"])
def test_a_lost_peer_ends_the_others_in_time(tmp_path: Path, case: str) -> None:
    """launch/gpu_check.sh checks afterwards that no process is left on the card."""
    store = str(tmp_path / "store")
    context = multiprocessing.get_context("spawn")  # CUDA does not outlive a fork
    ranks = [context.Process(target=lost, args=(rank, 2, case, store), daemon=True) for rank in range(2)]
    for process in ranks:
        process.start()
    try:
        ranks[0].join(90)
        assert ranks[0].exitcode not in (None, 0), "a lost peer went unnoticed"
    finally:
        for process in ranks:
            process.kill()
            process.join(20)


def lost(rank: int, world: int, case: str, store: str) -> None:
    import os
    from datetime import timedelta

    import torch.distributed as dist

    backend = "gloo"
    if ON_CUDA:
        # After a timeout torch waits four times this long for dumps of a flight recorder: by default for a minute.
        os.environ.update(shared_gpu(rank), TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC="1000")
        torch.cuda.set_device(CARD)
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=world,
                            timeout=timedelta(seconds=20))  # fmt: skip
    check_lost_peer(rank, world, case)
