"""The op passes torch.library's own checks; selective checkpointing saves its outputs; compile does not trace it."""

from __future__ import annotations

import functools

import pytest
import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from longctx.attention import SAVED_OPS, ContextParallel, context_attention, op
from longctx.attention.rank_attention import RankAttention


@pytest.fixture
def layout():
    cp = ContextParallel.from_world()
    yield cp.layout(seq_len=24, documents=[0, 10, 24])
    cp.close()


def inputs(layout, physical="bhsd"):
    shapes = [(1, heads, layout.local_len, 8) for heads in (4, 2, 2)]
    if physical == "bshd":
        made = [torch.randn(b, s, h, d).transpose(1, 2) for b, h, s, d in shapes]
    else:
        made = [torch.randn(shape) for shape in shapes]
    return [x.requires_grad_() for x in made]


@pytest.mark.parametrize("physical", ["bhsd", "bshd"])
def test_the_fake_implementation_matches(layout, physical):
    q, k, v = inputs(layout, physical)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(op.attend, (q, k, v, layout.boundaries, layout.handle, 0.3), test_utils=tests)
    out, lse = op.attend(q, k, v, layout.boundaries, layout.handle, 0.3)
    with torch.no_grad():
        arguments = (torch.randn_like(out), q, k, v, out, lse, layout.boundaries, layout.handle, 0.3)
        torch.library.opcheck(op.differentiate, arguments, test_utils=("test_schema", "test_faketensor"))
    assert out.stride() == q.stride()


def test_selective_checkpointing_runs_the_attention_forward_once(layout, monkeypatch):
    calls = []
    forward = RankAttention.forward
    monkeypatch.setattr(RankAttention, "forward", lambda *a: calls.append(1) or forward(*a))

    def policy(ctx, called, *args, **kwargs):
        return CheckpointPolicy.MUST_SAVE if called in SAVED_OPS else CheckpointPolicy.PREFER_RECOMPUTE

    def block(q, k, v):
        return context_attention(q * 1.5, k, v, layout).sin()

    q, k, v = inputs(layout)
    plain = torch.autograd.grad(block(q, k, v).sum(), (q, k, v))
    calls.clear()
    contexts = functools.partial(create_selective_checkpoint_contexts, policy)
    saved = checkpoint(block, q, k, v, use_reentrant=False, context_fn=contexts)
    again = torch.autograd.grad(saved.sum(), (q, k, v))
    assert len(calls) == 1
    for a, b in zip(plain, again, strict=True):
        assert torch.equal(a, b)


def test_compile_passes_over_it_without_recompiling_for_new_boundaries(layout):
    compiled = torch.compile(
        lambda q, k, v, boundaries: op.attend(q * 2, k, v, boundaries, layout.handle, 0.3)[0] + 1,
        fullgraph=True,
        backend="aot_eager",
    )
    q, k, v = inputs(layout)
    torch._dynamo.utils.counters.clear()
    for edges in ([0, 10, 24], [0, 7, 24], [0, 3, 24]):
        boundaries = torch.tensor(edges)
        want = op.attend(q * 2, k, v, boundaries, layout.handle, 0.3)[0] + 1
        got = compiled(q, k, v, boundaries)
        assert torch.equal(got, want)
        gradients = torch.autograd.grad(got.sum(), (q, k, v))
        for a, b in zip(gradients, torch.autograd.grad(want.sum(), (q, k, v)), strict=True):
            assert torch.allclose(a, b, atol=1e-6)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_lse_is_not_differentiable(layout):
    q, k, v = inputs(layout)
    _, lse = context_attention(q, k, v, layout, return_lse=True)
    assert not lse.requires_grad
    _, raw = op.attend(q, k, v, layout.boundaries, layout.handle, 0.3)
    with pytest.raises(ValueError, match="lse is not differentiable"):
        raw[:, :, 0].sum().backward()


def test_many_boundaries_are_forgotten_and_found_again(layout):
    q, k, v = inputs(layout)
    first = context_attention(q, k, v, layout)
    for edge in range(1, 24):
        layout.cp.layout(seq_len=24, documents=[0, edge, 24])
    assert len(layout.cache.recent) == 16
    again = context_attention(q, k, v, layout)
    assert torch.equal(first, again)
    again.sum().backward()
    assert q.grad is not None
