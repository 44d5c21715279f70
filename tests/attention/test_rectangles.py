"""Many rectangles in one call: cu_seqlens compared with dense attention, and the kernel chosen for each rectangle."""

from __future__ import annotations

import logging
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longctx.attention import ContextParallel, context_attention, kernels
from longctx.attention.kernels import KERNELS
from longctx.attention.rectangles import DenseCall, PackedCall, Runs, _say_left, plan_calls
from longctx.distributed.thread_transport import ThreadWorld
from longctx.layout import Rect
from longctx.topology import Topology
from tests.attention.packed_kernel import PackedKernel, install, picky
from tests.dist.parity import TOLERANCE, oracle

DOCUMENTS = (0, 1, 2, 9, 10, 30, 31, 32, 50, 61)
LONG = (0, 32, 36, 40, 41, 50, 64)


@pytest.fixture(autouse=True)
def _kernels_of_the_package():
    yield
    kernels.choose.cache_clear()
    kernels.serving.cache_clear()


@pytest.fixture
def packed(monkeypatch):
    made = PackedKernel()
    install(monkeypatch, made.kernel())
    return made


def check(nodes, ranks, schedule, kind, seq_len, documents, heads=(8, 2), ulysses=None):
    """out, lse, dq, dk and dv of virtual ranks within 1e-10 of dense attention, for a batch of two."""
    x = oracle(seq_len, documents, *heads)

    def work(transport):
        cp = ContextParallel(transport, Topology(nodes, ranks), schedule, ulysses=ulysses)
        layout = cp.layout(seq_len=seq_len, documents=list(documents) if documents else None, kind=kind)
        # Tokens before heads in memory, as a model's projections leave them.
        inputs = [layout.shard(x[name], dim=2).transpose(1, 2).contiguous().transpose(1, 2) for name in "qkv"]
        q, k, v = (one.requires_grad_() for one in inputs)
        out, lse = context_attention(q, k, v, layout, return_lse=True)
        out.backward(layout.shard(x["dout"], dim=2))
        real = layout.valid
        for name, got in {"out": out, "lse": lse, "dq": q.grad, "dk": k.grad, "dv": v.grad}.items():
            error = (got[:, :, real] - layout.shard(x[name], dim=2)[:, :, real]).abs().max().item()
            assert error < TOLERANCE, f"{name} differs by {error}"  # NaN is not below
        for name, got in {"dq": q.grad, "dk": k.grad, "dv": v.grad}.items():
            assert not got[:, :, ~real].any(), f"{name} of padding is not zero"
        cp.close()

    ThreadWorld(nodes * ranks).run(work)


@pytest.mark.parametrize(
    ("nodes", "ranks", "schedule", "ulysses"),
    [(1, 1, "flat_ring", None), (1, 2, "flat_ring", None), (1, 4, "flat_ring", None), (2, 2, "double_ring", None),
     (3, 2, "double_ring", None), (2, 2, "allgather_ring", None), (2, 2, "ulysses_ring", 2)],
)  # fmt: skip
@pytest.mark.parametrize(
    ("kind", "seq_len", "documents"),
    [("zigzag", 64, None), ("zigzag", 61, DOCUMENTS), ("contiguous", 61, DOCUMENTS), ("documents", 64, LONG)],
)
def test_packed_calls_equal_dense_attention(packed, nodes, ranks, schedule, ulysses, kind, seq_len, documents):
    check(nodes, ranks, schedule, kind, seq_len, documents, ulysses=ulysses)
    assert bool(packed.calls) or documents is None


@pytest.mark.parametrize("heads", [(8, 8), (8, 1)])
def test_packed_calls_take_any_group_of_heads(packed, heads):
    check(1, 2, "flat_ring", "documents", 64, LONG, heads)


def test_what_one_kernel_leaves_the_next_takes(monkeypatch, caplog):
    made = PackedKernel()
    install(monkeypatch, picky(8), made.kernel())
    _say_left.cache_clear()
    with caplog.at_level(logging.INFO, "longctx.attention"):
        for _ in range(2):
            check(1, 2, "flat_ring", "zigzag", 61, DOCUMENTS)
            check(2, 2, "allgather_ring", "documents", 64, LONG)
    assert made.calls
    left = [r.getMessage() for r in caplog.records if "serves the others" in r.getMessage()]
    assert left == ["attention kernel picky takes blocks of 8 and more; packed serves the others"]


def test_all_documents_of_a_rank_are_one_call(packed):
    """Forward and backward, however many documents; a ring adds one call per hop in which pieces of several meet."""
    check(1, 1, "flat_ring", "zigzag", 64, tuple(range(65)))
    assert packed.calls == [(128, True), (128, True)]  # 64 documents of one token, a batch of two
    assert packed.dense == 0


def test_one_document_needs_no_packed_call(packed):
    check(1, 1, "flat_ring", "zigzag", 64, None)
    check(2, 2, "double_ring", "zigzag", 64, None)
    assert packed.calls == []
    assert packed.dense > 0


def test_cu_seqlens_and_bounds_of_a_batch():
    call = PackedCall(PackedKernel().kernel(), [Rect(0, 3, 0, 3, False), Rect(3, 4, 5, 205, False)])
    at = call.lengths(torch.device("cpu"), 2)
    assert at.cu_q.tolist() == [0, 3, 4, 7, 8]
    assert at.cu_k.tolist() == [0, 3, 203, 206, 406]
    assert (at.cu_q.dtype, at.max_q, at.max_k) == (torch.int32, 128, 256)
    assert call.lengths(torch.device("cpu"), 2) is at
    assert call.queries.edges == ((0, 4),)
    assert call.keys.edges == ((0, 3), (5, 205))


SPANS = st.lists(st.tuples(st.integers(0, 20), st.integers(1, 6)), min_size=1, max_size=6)


@given(SPANS, st.integers(1, 2))
@settings(max_examples=60)
def test_packing_and_unpacking_are_each_others_inverse(spans, batch):
    edges = [(first, first + size) for first, size in spans]
    runs = Runs.joining(edges)
    x = torch.arange(batch * 2 * 30 * 3, dtype=torch.float64).view(batch, 2, 30, 3)
    packed, sums = runs.pack(x), runs.pack_lse(x[..., 0])
    assert packed.shape == (batch * runs.count, 2, 3)
    assert sums.shape == (2, batch * runs.count)
    assert runs.count == sum(size for _, size in spans)
    assert torch.equal(packed, torch.cat([x[b, :, a:c].transpose(0, 1) for b in range(batch) for a, c in edges]))
    for (where, part), (same, total) in zip(runs.unpack(packed, batch), runs.unpack_lse(sums, batch), strict=True):
        assert where == same
        assert torch.equal(part, x[:, :, where])
        assert torch.equal(total, x[:, :, where, 0])


def diagonal(*sizes):
    edges = np.r_[0, np.cumsum(sizes)].tolist()
    return [Rect(a, b, a, b, True) for a, b in pairwise(edges)]


def taken(rects, names, recurring):
    """[(kernel, tokens of its rectangles)] of the calls that the named kernels make, in the order of the calls."""
    calls = plan_calls(rects, [KERNELS[name] for name in names], recurring)
    return [
        (call.kernel.name, call.rect.q1 - call.rect.q0 if isinstance(call, DenseCall) else call.queries.count)
        for call in calls
    ]


GPU = ("cudnn", "torch_flash", "reference")


def test_cudnn_takes_large_blocks_whose_shape_comes_again():
    assert taken(diagonal(50_000), GPU, True) == [("cudnn", 50_000)]
    assert taken(diagonal(65_536), GPU, False) == [("cudnn", 65_536)]
    assert taken(diagonal(50_000), GPU, False) == [("torch_flash", 50_000)]
    assert taken(diagonal(1), GPU, True) == [("torch_flash", 1)]
    assert taken(diagonal(1, 4096, 1000, 50_001), GPU, False) == [("cudnn", 4096), ("torch_flash", 51_002)]
    square = [Rect(0, 2048, 0, 512, False), Rect(2048, 4096, 0, 2048, False)]
    assert taken(square, GPU, True) == [("cudnn", 2048), ("torch_flash", 2048)]


def test_a_kernel_with_cu_seqlens_takes_causal_and_plain_rectangles_in_a_call_each():
    mixed = [*diagonal(5, 7, 9), Rect(0, 5, 0, 3, False), Rect(5, 12, 3, 9, False)]
    assert taken(mixed, ("flash_attn_4", "cudnn", "torch_flash"), False) == [("flash_attn_4", 21), ("flash_attn_4", 12)]
    assert taken(diagonal(9), ("flash_attn_2", "cudnn"), False) == [("flash_attn_2", 9)]


def test_the_cpu_takes_rectangle_by_rectangle_in_order():
    rects = [*diagonal(5, 7), Rect(0, 5, 0, 3, False)]
    assert [call.rect for call in plan_calls(rects, [KERNELS["torch_cpu"], KERNELS["reference"]], False)] == rects
    assert taken(rects, ("reference",), True) == [("reference", 5), ("reference", 7), ("reference", 5)]
