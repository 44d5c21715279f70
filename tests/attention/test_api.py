"""The public API: bad input is reported before any transfer, one rank works, `unshard` restores what `shard` cut."""

from __future__ import annotations

import gc
import pickle
import subprocess
import sys

import pytest
import torch

import longctx
from longctx.attention import ContextParallel, context_attention
from longctx.distributed.thread_transport import ThreadWorld
from longctx.distributed.transport import DetachedTransport
from longctx.topology import Topology


@pytest.fixture(scope="module")
def solo():
    cp = ContextParallel.from_world()
    yield cp
    cp.close()


def qkv(layout, q_heads=4, kv_heads=2, dim=8, dtype=torch.float32):
    heads = (q_heads, kv_heads, kv_heads)
    return [torch.randn(1, h, layout.local_len, dim, dtype=dtype, requires_grad=True) for h in heads]


def test_the_public_names():
    assert longctx.ContextParallel is ContextParallel
    assert longctx.context_attention is context_attention


def test_import_needs_neither_cuda_nor_distributed():
    code = "import longctx, sys; assert 'torch' not in sys.modules; longctx.ContextParallel"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_one_rank_equals_torch(solo):
    layout = solo.layout(seq_len=33)
    q, k, v = qkv(layout, dtype=torch.float64)
    out, lse = context_attention(q, k, v, layout, return_lse=True)
    want = torch.nn.functional.scaled_dot_product_attention(
        *(layout.unshard(x, 2) for x in (q, k, v)), is_causal=True, enable_gqa=True
    )
    got = layout.unshard(out, 2)
    assert (got - want).abs().max() < 1e-12
    assert lse.shape == (1, 4, layout.local_len)
    assert torch.isneginf(lse[:, :, ~layout.valid]).all()
    assert solo.bytes.per_level() == {"inner": 0, "outer": 0}


def test_any_strides_are_read_as_what_they_are(solo):
    """torch's kernel on a CPU reads past a tensor whose last dimension is not contiguous."""
    layout = solo.layout(seq_len=32)
    dense = [x.detach() for x in qkv(layout)]
    turned = [x.transpose(2, 3).contiguous().transpose(2, 3).requires_grad_() for x in dense]
    assert {x.stride(3) for x in turned} == {32}
    dense = [x.requires_grad_() for x in dense]
    results = []
    for inputs in (dense, turned):
        out = context_attention(*inputs, layout)
        out.mean(3).square().sum().backward()  # a gradient of stride 0
        results.append([out.detach(), *(x.grad for x in inputs)])
    for ours, expected in zip(*reversed(results), strict=True):
        assert torch.allclose(ours, expected, atol=1e-6)


def test_scale_is_used(solo):
    layout = solo.layout(seq_len=16)
    q, k, v = qkv(layout)
    assert torch.allclose(
        context_attention(q, k, v, layout, scale=0.7),
        context_attention(q * 0.7, k, v, layout, scale=1.0),
        atol=1e-6,
    )


def test_sharding_pads_integers_with_the_ignored_label(solo):
    layout = solo.layout(seq_len=9)
    labels = layout.shard(torch.arange(9)[None], dim=1)
    assert labels.shape == (1, 10)
    assert labels[0, -1] == -100
    assert layout.shard(torch.arange(9)[None], dim=1, fill=0)[0, -1] == 0
    assert layout.shard(torch.ones(1, 9), dim=1)[0, -1] == 0
    assert layout.shard(torch.ones(1, 9, dtype=torch.uint8), dim=1)[0, -1] == 0  # a mask, in which -100 would be 156
    assert layout.valid.tolist() == [True] * 9 + [False]
    assert layout.indices.tolist() == [*range(9), -1]


def test_unshard_returns_the_whole_and_its_backward_this_ranks_slice():
    whole = torch.randn(2, 3, 21, dtype=torch.float64)

    def work(transport):
        cp = ContextParallel(transport, Topology(1, 4))
        layout = cp.layout(seq_len=21, documents=[0, 4, 21], kind="documents")
        local = layout.shard(whole, dim=2).requires_grad_()
        back = layout.unshard(local, dim=2)
        (back * whole).sum().backward()
        assert torch.equal(local.grad, layout.shard(whole, dim=2))
        assert torch.equal(layout.shard(torch.arange(21), 0)[layout.valid], layout.indices[layout.valid])
        return back.detach()

    for back in ThreadWorld(4).run(work):
        assert torch.equal(back, whole)


def test_sharding_is_differentiable(solo):
    layout = solo.layout(seq_len=11)
    x = torch.randn(1, 11, requires_grad=True)
    layout.shard(x, dim=1).sum().backward()
    assert torch.equal(x.grad, torch.ones(1, 11))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda q, k, v: (q[0], k, v), "q has shape"),
        (lambda q, k, v: (q[:, :, :3], k, v), "q has 3 tokens"),
        (lambda q, k, v: (q[:, :3], k, v), "q has 3 heads, k has 2"),
        (lambda q, k, v: (q, k, v[:, :1]), "k has shape"),
        (lambda q, k, v: (q, k[..., :4], v[..., :4]), "batch and head_dim"),
        (lambda q, k, v: (q, k.double(), v), "one dtype"),
        (lambda q, k, v: (q.long(), k.long(), v.long()), "int64"),
        (lambda q, k, v: (q, k, v.to("meta")), "one device"),
    ],
)
def test_bad_tensors_are_named(solo, change, words):
    layout = solo.layout(seq_len=16)
    with pytest.raises(ValueError, match=words):
        context_attention(*change(*qkv(layout)), layout)


def test_a_dense_mask_is_refused(solo):
    layout = solo.layout(seq_len=16)
    with pytest.raises(ValueError, match="dense mask"):
        context_attention(*qkv(layout), torch.ones(16, 16))
    with pytest.raises(ValueError, match="dense mask"):
        context_attention(*qkv(layout), layout, attn_mask=torch.ones(16, 16))
    with pytest.raises(ValueError, match="dense mask"):
        solo.layout(seq_len=16, documents=torch.ones(16, 16, dtype=torch.bool))


def test_bad_combinations_are_named(solo):
    transport = ThreadWorld(8).run(lambda transport: transport)[0]
    with pytest.raises(ValueError, match="nodes=3 does not divide the 1 ranks"):
        ContextParallel.from_world(nodes=3)
    with pytest.raises(ValueError, match="ulysses=3 does not divide the 4 ranks of a node"):
        ContextParallel(transport, Topology(2, 4), "ulysses_ring", ulysses=3)
    with pytest.raises(ValueError, match="only ulysses_ring"):
        ContextParallel(transport, Topology(2, 4), "flat_ring", ulysses=2)
    with pytest.raises(ValueError, match="schedule='star'"):
        ContextParallel.from_world(schedule="star")
    cp = ContextParallel(transport, Topology(1, 8), "ulysses_ring")
    layout = cp.layout(seq_len=64)
    with pytest.raises(ValueError, match="ulysses=8 does not divide the 4 query heads"):
        context_attention(*qkv(layout), layout)
    with pytest.raises(ValueError, match="6 kv heads"):
        context_attention(*qkv(layout, 24, 6), layout)
    with pytest.raises(ValueError, match="positions='both'"):
        solo.layout(seq_len=16, positions="both")
    with pytest.raises(ValueError, match="x has 15 tokens"):
        solo.layout(seq_len=16).shard(torch.zeros(15), 0)
    with pytest.raises(ValueError, match="x has 15 tokens"):
        solo.layout(seq_len=16).unshard(torch.zeros(15), 0)


def test_a_closed_context_says_so():
    cp = ContextParallel.from_world()
    layout = cp.layout(seq_len=16)
    inputs = qkv(layout)
    cp.close()
    cp.close()
    with pytest.raises(ValueError, match="closed"):
        context_attention(*inputs, layout)


def test_positions_restart_per_document_when_asked(solo):
    boundaries = torch.tensor([0, 5, 12], dtype=torch.int32)
    through = solo.layout(seq_len=12, documents=boundaries)
    restart = solo.layout(seq_len=12, documents=boundaries, positions="document")
    assert through.positions.tolist() == list(range(12))
    assert restart.positions.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6]
    assert restart.local_boundaries.tolist() == [0, 5, 12]


def test_a_trace_shows_compute_and_transfers(tmp_path):
    import json

    def work(transport):
        cp = ContextParallel(transport, Topology(2, 2), "double_ring", trace=True)
        layout = cp.layout(seq_len=64)
        context_attention(*qkv(layout), layout).sum().backward()
        cp.write_trace(tmp_path / f"{transport.rank}.json")

    ThreadWorld(4).run(work)
    events = json.loads((tmp_path / "3.json").read_text())["traceEvents"]
    rows = {event["tid"] for event in events}
    assert rows == {"compute", "kv.inner", "kv.outer", "dkv.inner", "dkv.outer"}
    assert all(event["dur"] >= 0 and event["pid"] == 3 for event in events)
    with pytest.raises(ValueError, match="trace=True"):
        ContextParallel.from_world().write_trace(tmp_path / "x.json")


def test_a_layout_travels_to_and_from_a_data_loaders_worker(solo):
    """It returns to the group that it came from, so that the batch is ready for attention."""
    layout = solo.layout(64, documents=[0, 40, 64], positions="document")
    again = pickle.loads(pickle.dumps(layout))
    assert again.cp is solo
    assert again.handle == layout.handle
    assert torch.equal(again.positions, layout.positions)


def test_a_layout_in_another_process_shards_and_says_that_it_cannot_attend():
    """What a spawned worker of rank 1 has, which knows no ContextParallel of the training process."""
    there = ContextParallel(DetachedTransport(1, 2), Topology(1, 2))
    layout = there.layout(64)
    sent, name, indices = pickle.dumps(layout), there.name, layout.indices
    del there, layout
    gc.collect()
    here = pickle.loads(sent)
    assert (here.cp.rank, here.cp.size, here.cp.name) == (1, 2, name)
    assert torch.equal(here.shard(torch.arange(64)[None], dim=1)[0], indices)
    q = torch.zeros(1, 2, here.local_len, 8)
    with pytest.raises(ValueError, match="copy of one of rank 1 in another process"):
        context_attention(q, q, q, here)
    with pytest.raises(ValueError, match="'64k' is not a number of tokens"):
        here.cp.layout("64k")


def test_what_an_evaluation_in_inference_mode_has_made_serves_training():
    """Lightning evaluates so. The layout, what it keeps, and the buffers of the ring may come from there."""

    def work(transport):
        cp = ContextParallel(transport, Topology(1, 2))
        with torch.inference_mode():
            layout = cp.layout(seq_len=31)
            context_attention(*(x.detach() for x in qkv(layout)), layout)
            layout.shard(torch.ones(1, 31), dim=1)
        whole = torch.ones(1, 4, 31, 8, requires_grad=True)
        q, k, v = layout.shard(whole, dim=2), *qkv(layout)[1:]
        context_attention(q, k, v, layout).sum().backward()
        return k.grad.abs().sum() > 0 and whole.grad is not None

    assert all(ThreadWorld(2).run(work))
