"""The attention that transformers calls: it gets the layout as a keyword, and refuses unsupported masks by layer."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from longctx.attention import ContextParallel, context_attention
from longctx.attention.interface import NAME, attend, register


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
