"""A prepared model with peft's adapters: their dropout is drawn once a pass, and what cannot be reached is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate import dispatch_model
from peft import LoraConfig, PromptTuningConfig, get_peft_model

import longctx
from longctx.errors import UserError
from longctx.model import init_from
from tests.model.conftest import gradients, tiny, worst

TOKENS = 48


def with_dropout() -> Any:
    """A model whose products, the head's too, have a LoRA with dropout."""
    torch.manual_seed(0)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]
    config = LoraConfig(r=4, lora_dropout=0.2, target_modules=targets, init_lora_weights=False)
    return get_peft_model(init_from(tiny(), dtype="float64"), config).double().train()


def gradients_of(model: Any) -> dict[str, torch.Tensor]:
    layout = longctx.ContextParallel.from_world().layout(TOKENS)
    torch.manual_seed(1)
    model(**longctx.shard_batch(torch.arange(2 * TOKENS).view(2, TOKENS) % 61, layout)).loss_sum.backward()
    return gradients(model)


@pytest.mark.parametrize(
    "options",
    [{}, {"keep_attention": False}, {"keep_matmuls": 1}, {"offload_activations": True}],
    ids=["recompute", "full", "products", "offload"],
)
def test_what_is_recomputed_has_the_dropout_of_the_first_run(options: dict[str, Any]):
    """Otherwise the gradients belong to no forward pass; the loss shows nothing of it."""
    blocks: dict[str, Any] = {"ffn_block": 0, "loss_chunk": 24}
    kept = gradients_of(longctx.prepare(with_dropout(), activation_checkpointing=False, **blocks))
    assert worst(gradients_of(longctx.prepare(with_dropout(), **blocks, **options)), kept) < 1e-10


def test_a_block_of_tokens_draws_its_own_dropout_and_repeats_it():
    """The derivative along the gradient is its squared norm, if every pass draws the same numbers."""
    model = longctx.prepare(with_dropout(), ffn_block=16, loss_chunk=24)
    layout = longctx.ContextParallel.from_world().layout(TOKENS)
    batch = longctx.shard_batch(torch.arange(2 * TOKENS).view(2, TOKENS) % 61, layout)

    def loss() -> torch.Tensor:
        torch.manual_seed(1)
        return model(**batch).loss_sum

    loss().backward()
    trained = [(weight, weight.grad) for weight in model.parameters() if weight.grad is not None]
    found = []
    with torch.no_grad():
        for step in (1e-6, -2e-6):
            for weight, grad in trained:
                weight += step * grad
            found.append(loss().item())
    expected = sum(grad.square().sum().item() for _, grad in trained)
    assert (found[0] - found[1]) / 2e-6 == pytest.approx(expected, rel=1e-6)


def test_virtual_tokens_are_refused():
    """They would be left out, since they belong to peft's own forward."""
    model = get_peft_model(init_from(tiny()), PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"))
    with pytest.raises(UserError, match="prepare: model has peft's PROMPT_TUNING, whose virtual tokens"):
        longctx.prepare(model)


def test_layers_with_a_forward_of_their_own_are_refused():
    """As `device_map="auto"` makes them on several GPUs: transformers' forward would run, with an empty mask."""
    model = init_from(tiny())
    parts = ["model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head"]
    places: dict[str, Any] = dict.fromkeys(parts, "cpu")
    dispatch_model(model, places, main_device=torch.device("cpu"), force_hooks=True)
    with pytest.raises(UserError, match="prepare: layer 0 has a forward of its own, as accelerate's device_map"):
        longctx.prepare(model)
