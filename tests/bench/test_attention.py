"""bench attention: the two sides take turns, virtual ranks do the kernel's work, figures are consistent."""

import threading

import pytest
import torch

from longctx.attention import kernels
from longctx.bench.attention import measure_cpu
from longctx.bench.attention_case import AttentionCase
from longctx.bench.attention_virtual import measure
from longctx.bench.workers import WorkerGroup
from longctx.config.bench import BenchAttentionConfig
from longctx.distributed.thread_transport import ThreadWorld
from longctx.errors import RunFailed, UserError
from tests.attention.packed_kernel import PackedKernel, install
from tests.dist.ranks import CONTEXT


@pytest.fixture(autouse=True)
def forked(monkeypatch):
    """Workers are forked from the tests' server, which has imported torch, instead of starting Python anew."""
    monkeypatch.setattr("longctx.bench.workers.mp.get_context", lambda method: CONTEXT)


def echo(rank, world, port, settings):
    def serve(order):
        if order == "fail":
            raise ValueError("asked to fail")
        return rank, world, settings, order

    return serve


def test_a_team_answers_in_rank_order_and_reports_failures():
    with WorkerGroup(2, 1, echo, "settings") as team:
        assert team.ask("hello") == [(0, 2, "settings", "hello"), (1, 2, "settings", "hello")]
        with pytest.raises(RunFailed, match="asked to fail"):
            team.ask("fail")


def unprepared(rank, world, port, settings):
    raise ValueError("cannot prepare")


def test_a_worker_that_cannot_prepare_says_why():
    with WorkerGroup(1, 1, unprepared, None) as team:
        team._processes[0].join(60)
        with pytest.raises(RunFailed, match="cannot prepare"):
            team.ask("hello")


def test_flop_count_is_the_causal_one():
    assert AttentionCase(16, 1, 2, 1, 4, "float32").flop == 7 * 16 * 16 * 2 * 4


def test_ring_and_sdpa_take_turns():
    config = BenchAttentionConfig(lengths=[256], documents=[], heads=4, kv_heads=2, head_dim=16, repeats=2)
    document = measure_cpu(config)
    (row,) = document["rows"]
    assert len(row["samples"]["ring"]) == len(row["samples"]["sdpa"]) == 2
    ring, sdpa = row["samples"]["ring"], row["samples"]["sdpa"]
    assert 0.95 * min(sdpa) / max(ring) <= row["ratio"] <= 1.05 * max(sdpa) / min(ring)
    assert document["matrix_gflops"] > 0


def test_virtual_ranks_beside_the_bare_kernel():
    config = BenchAttentionConfig(
        lengths=[128], heads=4, kv_heads=2, head_dim=16, virtual_ranks=[1, 2, 4], repeats=1, device="cpu", documents=[]
    )
    document = measure(config, "cpu")
    assert [row["virtual_ranks"] for row in document["rows"]] == [0, 1, 2, 4]
    assert {row["backend"] for row in document["rows"]} == {"torch_cpu"}
    assert document["rows"][0]["of_kernel"] == 1.0
    assert "needs CUDA tensors" in document["refused"]["cudnn"][0]


def test_packed_documents_beside_the_kernels_own_call(monkeypatch):
    made = PackedKernel()
    install(monkeypatch, made.kernel())
    try:
        config = BenchAttentionConfig(
            lengths=[128], heads=4, kv_heads=2, head_dim=16, virtual_ranks=[1], repeats=1, backends=["packed"],
            documents=[2, 100],
        )  # fmt: skip
        document = measure(config, "cpu")
    finally:
        kernels.choose.cache_clear()
        kernels.serving.cache_clear()
    assert [row["documents"] for row in document["packed"]] == [2, 100]
    assert all(row["first_over_steady"] > 0 and row["of_kernel"] > 0 for row in document["packed"])
    assert {segments for segments, _ in made.calls} == {2, 100}
    assert len(document["rows"]) == 2
    with pytest.raises(ValueError, match="documents: 512 do not fit into lengths: 512 tokens"):
        BenchAttentionConfig(lengths=[512])


def test_a_virtual_rank_keeps_its_thread():
    """cuDNN keeps its plans by thread: a rank on another thread would build them again."""
    world = ThreadWorld(3, serial=True)
    first, second = (world.run(lambda transport: threading.get_ident()) for _ in range(2))
    assert first == second
    assert len(set(first)) == 3


def test_backends_are_refused_with_their_reasons():
    with pytest.raises(UserError, match="backends: cudnn cannot serve: needs CUDA tensors"):
        measure(BenchAttentionConfig(lengths=[128], documents=[], backends=["cudnn"]), "cpu")
    with pytest.raises(UserError, match="'flash' is not a kernel"):
        measure(BenchAttentionConfig(lengths=[128], documents=[], backends=["flash"]), "cpu")
    config = BenchAttentionConfig(
        lengths=[100], documents=[], heads=2, kv_heads=2, head_dim=16, virtual_ranks=[4], repeats=1
    )
    with pytest.raises(UserError, match="100 is not divisible by 2 x virtual_ranks = 8"):
        measure(config, "cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_every_backend_of_the_gpu_is_timed():
    config = BenchAttentionConfig(lengths=[2048], heads=8, kv_heads=2, head_dim=64, virtual_ranks=[1, 4], repeats=2)
    document = measure(config, "cuda")
    assert document["dtype"] == "bfloat16"
    for backend in {row["backend"] for row in document["rows"]}:
        assert [row["virtual_ranks"] for row in document["rows"] if row["backend"] == backend] == [0, 1, 4]
