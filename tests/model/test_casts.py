"""Casts of a prepared model: rotary frequencies are kept, and under fp16 the loss keeps small gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import longctx
from longctx.errors import UserError
from longctx.model import init_from
from tests.model.conftest import gradients, tiny, worst

TOKENS = 2048


def test_a_cast_of_a_prepared_model_leaves_its_frequencies_alone():
    """Rounded to bfloat16 they would be a rope of their own, and the saved model is served with the exact one."""
    model: Any = longctx.prepare(init_from(tiny(window=64), dtype="float32"))
    rotary = model.model.model.rotary_emb
    exact = rotary.inv_freq.clone()
    model.bfloat16()
    assert model.model.lm_head.weight.dtype == torch.bfloat16
    assert torch.equal(rotary.inv_freq, exact)
    longctx.set_rope(model, *longctx.rope_for(model, window=1024))
    exact = model.model.model.rotary_emb.inv_freq.clone()
    model.half()
    assert torch.equal(model.model.model.rotary_emb.inv_freq, exact)


def test_frequencies_in_fp64_and_back_are_kept_too():
    model: Any = longctx.prepare(init_from(tiny(window=64), dtype="float32"))
    rope, window = longctx.rope_for(model, window=1024)
    precisions: tuple[Any, ...] = ("float64", "float32")
    for precision in precisions:
        longctx.set_rope(model, rope, window, precision=precision)
        exact = model.model.model.rotary_emb.inv_freq.clone()
        model.bfloat16()
        assert torch.equal(model.model.model.rotary_emb.inv_freq, exact)


def test_a_model_that_was_cast_before_is_refused_until_its_frequencies_are_made_anew():
    plain: Any = init_from(tiny(), dtype="float32").to(torch.bfloat16)
    with pytest.raises(UserError, match=r"frequencies have been rounded to torch.bfloat16, .* longctx.set_rope"):
        longctx.prepare(plain)
    longctx.set_rope(plain, plain.config.rope_parameters, plain.config.max_position_embeddings)
    longctx.prepare(plain)
    assert plain.model.rotary_emb.inv_freq.dtype == torch.float32


@pytest.mark.parametrize("weighted", [False, True])
def test_fp16_with_a_scaled_loss_keeps_the_gradients_of_a_mean(weighted: bool):
    """A token's share of the mean is below fp16's smallest numbers; GradScaler multiplies only what backward gets."""
    model = longctx.prepare(init_from(tiny(vocab=509, window=TOKENS), dtype="float32"), loss_chunk=256)
    layout = longctx.ContextParallel.from_world().layout(TOKENS)
    made = torch.Generator().manual_seed(0)
    ids = torch.randint(509, (4, TOKENS), generator=made)
    weights = torch.rand(ids.shape, generator=made) if weighted else None

    def step(scale: float, autocast: bool) -> dict[str, Tensor]:
        model.zero_grad()
        with torch.autocast("cpu", torch.float16, enabled=autocast):
            loss = model(**longctx.shard_batch(ids, layout, weights=weights)).loss_sum
        (loss * scale).backward()
        return {name: grad / scale for name, grad in gradients(model).items()}

    assert worst(step(65536.0, autocast=True), step(1.0, autocast=False)) < 0.005
