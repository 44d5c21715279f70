"""Every kernel of this card against fp64, on activations of a trained model, packed documents and odd lengths."""

from __future__ import annotations

import itertools

import pytest
import torch

from longctx.attention import ContextParallel, context_attention, trial
from longctx.attention.kernels import KERNELS, choose, problem_of
from longctx.config.model import InitConfig
from longctx.distributed.thread_transport import ThreadWorld
from longctx.distributed.transport import SingleRankTransport
from longctx.eval.last_layer import attention_name
from longctx.eval.predict import one_process
from longctx.model import init_from
from longctx.topology import Topology
from tests.gpu.activations import DOCUMENTS, TOKENS, qkv, relative
from tests.gpu.card import CARD, DTYPE, DTYPE_NAME, ON_CUDA, needs_cuda

FAST = [name for name in KERNELS if (name == "torch_cpu") is not ON_CUDA and name != "reference"]
# (batch, query heads, kv heads, head dimension)
SHAPES = [(1, 8, 8, 64), (2, 8, 2, 96), (1, 8, 1, 128), (2, 4, 4, 128), (1, 8, 8, 256), (1, 8, 2, 256)]
BOUNDS = [0, *itertools.accumulate(DOCUMENTS)]
NAMES = ("out", "lse", "dq", "dk", "dv")


def skip_unless_it_serves(name, inputs):
    if reasons := KERNELS[name].unsupported_reasons(problem_of(inputs[0], inputs[1])):
        pytest.skip("; ".join(reasons))


def attend(transport, topology, inputs, documents, kernel, **options):
    """out, lse, dq, dk, dv of the whole sequence, computed by this rank and gathered from all."""
    cp = ContextParallel(transport, topology, kernel=kernel, **options)
    layout = cp.layout(seq_len=inputs[0].shape[2], documents=documents)
    q, k, v, dout = (layout.shard(x, dim=2) for x in inputs)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out, lse = context_attention(*leaves, layout, return_lse=True)
    out.backward(dout)
    found = [layout.unshard(x.detach().contiguous(), 2) for x in (out, lse, *(x.grad for x in leaves))]
    cp.close()
    return found


def alone(inputs, documents, kernel):
    return attend(SingleRankTransport(), Topology(), inputs, documents, kernel)


def exact(inputs, documents):
    return alone([x.double() for x in inputs], documents, "reference")


def check(got, want, documents):
    """Assert that the errors are those of bf16, over the whole and over every document by itself, also a short one."""
    for name, a, b in zip(NAMES, got, want, strict=True):
        assert torch.isfinite(a).all(), name
        if name == "lse":
            assert (a.double() - b).abs().max() < 5e-3
            continue
        size = b.square().mean().sqrt()
        for first, past in itertools.pairwise(documents):
            part, wanted = a[:, :, first:past].double(), b[:, :, first:past]
            error = (part - wanted).square().mean().sqrt()
            limit = 0.015 * max(float(wanted.square().mean().sqrt()), 0.3 * float(size)) + 1e-4
            assert error <= limit, f"{name} of tokens {first} to {past}: {float(error):.3g}, at most {limit:.3g}"


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "-".join(map(str, shape)))
@pytest.mark.parametrize("name", FAST)
def test_packed_documents_equal_fp64(name, shape):
    """Documents of 1, 2, 7, 63, 64, 65 and 4,097 tokens; the backward takes the out and lse of the forward."""
    inputs = qkv(shape[0], TOKENS, *shape[1:], DTYPE)
    skip_unless_it_serves(name, inputs)
    check(alone(inputs, BOUNDS, name), exact(inputs, BOUNDS), BOUNDS)


@pytest.mark.parametrize("length", [1, 2, 65, 1024, 4097])
@pytest.mark.parametrize("name", FAST)
def test_one_document_of_any_length_equals_fp64(name, length):
    inputs = qkv(1, length, 8, 2, 64, DTYPE)
    skip_unless_it_serves(name, inputs)
    if length == 1:  # the layout needs two tokens, as two documents of one
        inputs = qkv(1, 2, 8, 2, 64, DTYPE)
    bounds = [0, 1, 2] if length == 1 else [0, length]
    check(alone(inputs, bounds, name), exact(inputs, bounds), bounds)


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("name", FAST)
def test_a_ring_errs_little_more_than_the_kernel_alone(name, ranks):
    """The backward of every block from the global out and lse; at most 1.25 of the single kernel's own error."""
    inputs = qkv(1, 4096, 8, 2, 128, DTYPE)
    skip_unless_it_serves(name, inputs)
    want, single = exact(inputs, None), alone(inputs, None, name)

    def work(transport):
        return attend(transport, Topology(1, ranks), inputs, None, name)

    got = ThreadWorld(ranks, serial=True).run(work)[0]
    for field, a, b, c in zip(NAMES, got, want, single, strict=True):
        if field != "lse":
            assert relative(a, b) <= 1.25 * relative(c, b) + 1e-5, field


@pytest.mark.parametrize("documents", [None, BOUNDS], ids=["one", "packed"])
def test_fp64_and_fp32_attend_exactly(documents):
    inputs = qkv(1, TOKENS, 4, 2, 64, torch.float64)
    want = exact(inputs, documents)

    def work(transport):
        return attend(transport, Topology(2, 2), inputs, documents, None, schedule="double_ring")

    for a, b in zip(ThreadWorld(4, serial=True).run(work)[0], want, strict=True):
        assert (a - b).abs().max() < 1e-9


@pytest.mark.parametrize("heads", [(8, 8), (8, 2), (8, 1)], ids=str)
@pytest.mark.parametrize("name", FAST)
def test_the_trial_before_a_run_holds(name, heads):
    """A kernel that errs as it must is not passed over."""
    inputs = qkv(1, 65, *heads, 128, DTYPE)
    skip_unless_it_serves(name, inputs)
    assert trial.tried(KERNELS[name], problem_of(inputs[0], inputs[1])) == ""


@needs_cuda
def test_the_card_has_a_fast_kernel():
    q = torch.empty(1, 8, 2, 128, dtype=DTYPE, device=CARD)
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("this card has no bfloat16 units")
    assert choose(problem_of(q, q)).name in FAST


@pytest.mark.parametrize("tokens", [8192, 4097])
def test_needles_are_answered_as_by_the_whole_model(tokens):
    """The evaluation's attention, whose mask is explicit, takes other kernels than a causal one."""
    spec = InitConfig(layers=2, hidden=256, heads=8, kv_heads=2, head_dim=64, ffn=128, vocab=512, window=8192)
    model = init_from(spec, dtype=DTYPE_NAME).to(CARD).eval()
    ids = torch.randint(0, spec.vocab, (tokens,), generator=torch.Generator().manual_seed(0))
    where = torch.tensor([0, 1, tokens // 2, tokens - 2, tokens - 1])
    logits = []
    for attention in ("sdpa", attention_name()):
        model.set_attn_implementation(attention)
        logits.append(one_process(model)(ids, where))
    assert relative(logits[1], logits[0]) < (1e-2 if ON_CUDA else 1e-5)
