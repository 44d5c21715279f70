"""The attention that transformers calls: it gets the layout as a keyword, and refuses unsupported masks by layer."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM
from transformers.masking_utils import AttentionMaskInterface

from longctx.attention import ContextParallel, context_attention
from longctx.attention.interface import NAME, attend, no_mask, register
from longctx.distributed.thread_transport import ThreadWorld
from longctx.topology import Topology


class Layer(nn.Module):
    layer_idx = 7
    is_causal = True


@pytest.fixture
def call():
    cp = ContextParallel.from_world()
    layout = cp.layout(seq_len=16)
    q, k, v = (torch.randn(1, heads, 16, 8) for heads in (4, 2, 2))
    yield lambda **options: attend(Layer(), q, k, v, **{"layout": layout, **options}), (q, k, v, layout)
    cp.close()


def test_it_is_registered_through_a_callable():
    known = {}
    assert register(known.__setitem__) == NAME
    assert known == {NAME: attend}
    masks = {}
    register(known.__setitem__, masks=masks.__setitem__)
    assert masks == {NAME: no_mask}


def test_it_returns_heads_last(call):
    run, (q, k, v, layout) = call
    out, weights = run(scaling=0.25, sliding_window=None, position_ids=torch.arange(16))
    assert weights is None
    assert out.shape == (1, 16, 4, 8)
    assert torch.equal(out.transpose(1, 2), context_attention(q, k, v, layout, scale=0.25))
    run(sliding_window=16)  # as wide as the sequence: nothing is cut off


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"layout": None}, "no layout"),
        ({"sliding_window": 8}, "sliding_window=8"),
        ({"softcap": 30.0}, "softcap=30.0"),
        ({"s_aux": torch.zeros(4)}, "sinks"),
        ({"dropout": 0.1}, "dropout=0.1"),
        ({"attention_mask": torch.ones(16, 16)}, "dense mask"),
        ({"is_causal": False}, "not causal"),
    ],
)
def test_what_it_cannot_do_is_refused_with_the_layer_named(call, options, words):
    run, _ = call
    with pytest.raises(ValueError, match=words) as caught:
        run(**options)
    assert "Layer of layer 7" in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "key", "words"),
    [
        ("chunked_attention", "attention_chunk_size", "attention_chunk_size=8"),
        ("sliding_attention", "sliding_window", "sliding_window=8"),
        ("indexed_attention", "none", "is indexed_attention in the config's layer_types"),
    ],
)
def test_a_layer_that_sees_less_by_its_kind_is_refused(call, kind, key, words):
    """Llama 4's chunks come with a mask, which no model builds here."""
    _, (q, k, v, layout) = call
    layer = Layer()
    layer.config = SimpleNamespace(layer_types=["full_attention"] * 7 + [kind], **{key: 8})  # type: ignore[assignment]
    with pytest.raises(ValueError, match=f"Layer of layer 7 .*{words}"):
        attend(layer, q, k, v, layout=layout)


@pytest.mark.parametrize("kind", ["full_attention", "attention"])
def test_a_layer_that_sees_everything_may_have_either_of_its_names(call, kind):
    """transformers 5.0 lists "attention" among its layer_types, and later releases read it as full_attention."""
    _, (q, k, v, layout) = call
    layer = Layer()
    layer.config = SimpleNamespace(layer_types=[kind] * 8, sliding_window=8)  # type: ignore[assignment]
    assert attend(layer, q, k, v, layout=layout)[0].shape[1] == q.shape[2]


# ---- transformers' own forward

SHAPE = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}  # fmt: skip
IDS = torch.arange(64).view(2, 32) % 61


def llama(attention: str) -> LlamaForCausalLM:
    register(AttentionInterface.register, masks=AttentionMaskInterface.register)
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SHAPE, attn_implementation=attention)).eval()


def test_a_models_own_forward_computes_what_transformers_does_under_autocast_too():
    """The rotation leaves q and k in fp32 beside a bf16 v; transformers' sdpa casts them as well."""
    ours, theirs = llama(NAME), llama("sdpa")
    layout = ContextParallel.from_world().layout(seq_len=32)
    with torch.no_grad():
        assert (ours(IDS, layout=layout).logits - theirs(IDS).logits).abs().max() < 1e-5
        with torch.autocast("cpu", torch.bfloat16):
            found = ours(IDS, layout=layout, use_cache=False).logits
            expected = theirs(IDS, use_cache=False).logits
    assert found.dtype == expected.dtype
    assert (found - expected).abs().max() < 0.02 * expected.abs().max()


def test_padding_on_the_left_is_refused_and_on_the_right_is_not():
    ours, theirs = llama(NAME), llama("sdpa")
    layout = ContextParallel.from_world().layout(seq_len=32)
    mask = torch.ones_like(IDS)
    mask[0, 20:] = 0
    with torch.no_grad():
        apart = ours(IDS, attention_mask=mask, layout=layout).logits - theirs(IDS, attention_mask=mask).logits
        assert apart[mask.bool()].abs().max() < 1e-5
        with pytest.raises(ValueError, match="padding on the left"):
            ours(IDS, attention_mask=mask.flip(1), layout=layout)


def test_positions_of_documents_that_the_layout_has_not_are_refused():
    """transformers' own attention takes positions that begin again for documents."""
    ours, theirs = llama(NAME), llama("sdpa")
    cp = ContextParallel.from_world()
    layout = cp.layout(seq_len=32, documents=[0, 12, 32], positions="document")
    positions = layout.positions[None].expand(2, -1)
    with torch.no_grad():
        expected = theirs(IDS, position_ids=positions, use_cache=False).logits
        assert (ours(IDS, position_ids=positions, layout=layout).logits - expected).abs().max() < 1e-5
        with pytest.raises(ValueError, match=r"layer 0 got position_ids that begin again inside a document"):
            ours(IDS, position_ids=positions, layout=cp.layout(seq_len=32))
        ours(IDS, position_ids=positions + 100 * (positions > 5), layout=layout)  # jumps forward are nobody's mistake


def test_positions_that_the_model_makes_itself_are_refused_on_several_ranks():
    """A rank's tokens are not the first ones of the sequence; attention would be exact for other angles."""

    def work(transport):
        cp = ContextParallel(transport, Topology(1, 2))
        layout = cp.layout(seq_len=32)
        q = torch.randn(1, 2, layout.local_len, 8)
        with pytest.raises(ValueError, match=r"pass position_ids=layout.positions\[None\]"):
            attend(Layer(), q, q, q, layout=layout, position_ids=torch.arange(layout.local_len)[None])
        return attend(Layer(), q, q, q, layout=layout, position_ids=layout.positions[None])[0].shape

    assert ThreadWorld(2).run(work) == [(1, 16, 2, 8)] * 2
