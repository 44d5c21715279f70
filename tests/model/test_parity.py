"""Loss and every gradient beside plain transformers, for every family and every setting of the memory
dials.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch

from longctx import ContextParallel
from longctx.config.model import MemoryConfig
from longctx.eval.loss import token_losses
from longctx.eval.predict import load_plain, one_process
from longctx.model import LossModel, init_from
from longctx.model.architectures import ARCHITECTURES
from tests.model.conftest import dense_mask, gradients, plain_token_losses, sequence, tiny, worst

SMALL = {"ffn_block": 40, "loss_chunk": 24}
DIALS = {
    "recompute": MemoryConfig(**SMALL),
    "keep one layer's products": MemoryConfig(keep_matmuls=1, **SMALL),
    "keep all products": MemoryConfig(keep_matmuls=2, **SMALL),
    "keep everything": MemoryConfig(activation_checkpointing=False, **SMALL),
    "offload": MemoryConfig(offload_activations=True, **SMALL),
    "full recomputation": MemoryConfig(keep_attention=False, **SMALL),
    "full recomputation, offload": MemoryConfig(keep_attention=False, offload_activations=True, **SMALL),
}
DOCUMENTS = [0, 37, 40, 90, 128]


def pair(family: str, dtype: str, **changes):
    """The same weights under our attention and under transformers' own."""
    theirs = init_from(tiny(family, **changes), dtype=dtype, attention="sdpa")
    ours = init_from(tiny(family, **changes), dtype=dtype)
    with torch.no_grad():  # norms and biases begin at 1 and 0; give every weight a value of its own
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            b.add_(0.02 * torch.randn(b.shape, dtype=b.dtype, generator=torch.Generator().manual_seed(b.numel())))
            a.copy_(b)
    return ours, theirs


@pytest.mark.parametrize("family", ARCHITECTURES)
@pytest.mark.parametrize(("dtype", "loss_bar", "gradient_bar"), [("float32", 1e-6, 1e-5), ("float64", 1e-12, 1e-10)])
def test_loss_and_gradients_of_every_family(family, dtype, loss_bar, gradient_bar):
    ours, theirs = pair(family, dtype)
    ids, positions, labels = sequence(128, batch=2)
    expected = plain_token_losses(theirs, ids, positions, labels)
    expected.sum().backward()
    model = LossModel(ours, DIALS["recompute"])
    out = model(ids, positions, labels, per_token=True)
    out.loss_sum.backward()
    assert out.loss_sum.item() == pytest.approx(expected.sum().item(), rel=loss_bar)
    torch.testing.assert_close(out.per_token, expected.detach(), rtol=20 * loss_bar, atol=20 * loss_bar)
    assert out.tokens == 2 * 127
    assert worst(gradients(ours), gradients(theirs)) < gradient_bar


@pytest.mark.parametrize("dial", DIALS)
def test_documents_and_weights_for_every_dial(dial):
    ours, theirs = pair("llama", "float64", tie_embeddings=True)
    ids, positions, labels = sequence(128)
    labels[:, [end - 1 for end in DOCUMENTS[1:]]] = -100
    weights = torch.rand(labels.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    mask = dense_mask(DOCUMENTS, torch.float64)
    expected = (weights * plain_token_losses(theirs, ids, positions, labels, mask)).sum()
    expected.backward()
    context = ContextParallel.from_world()
    layout = context.layout(seq_len=128, documents=DOCUMENTS)
    model = LossModel(ours, DIALS[dial])
    out = model(
        layout.shard(ids, dim=1),
        layout.positions,
        layout.shard(labels, dim=1),
        layout.shard(weights, dim=1),
        layout,
    )
    out.loss_sum.backward()
    context.close()
    assert out.loss_sum.item() == pytest.approx(expected.item(), rel=1e-12)
    assert out.weight_sum.item() == pytest.approx(weights[labels != -100].sum().item(), rel=1e-12)
    assert worst(gradients(ours), gradients(theirs)) < 1e-10


def test_every_dial_gives_bit_equal_gradients():
    found = []
    for memory in DIALS.values():
        ours, _ = pair("llama", "float32")
        ids, positions, labels = sequence(96)
        LossModel(ours, memory)(ids, positions, labels).loss_sum.backward()
        found.append(gradients(ours))
    for other in found[1:]:
        assert all(torch.equal(found[0][name], other[name]) for name in found[0])


def test_perturbing_one_document_leaves_the_other_losses_bit_equal():
    ours, _ = pair("llama", "float32")
    model = LossModel(ours, DIALS["recompute"])
    ids, _, labels = sequence(128)
    labels[:, [end - 1 for end in DOCUMENTS[1:]]] = -100
    context = ContextParallel.from_world()
    layout = context.layout(seq_len=128, documents=DOCUMENTS)
    before = model(ids, layout.positions, labels, layout=layout, per_token=True).per_token
    changed = ids.clone()
    changed[:, 40:90] = (changed[:, 40:90] + 1) % 61
    after = model(changed, layout.positions, labels, layout=layout, per_token=True).per_token
    context.close()
    others = [*range(40), *range(90, 128)]
    assert torch.equal(before[:, others], after[:, others])
    assert not torch.equal(before[:, 40:90], after[:, 40:90])


def test_frozen_embedding_and_lora_only():
    from peft import LoraConfig, get_peft_model

    ours, theirs = pair("llama", "float64")
    targets = ["q_proj", "o_proj", "down_proj", "lm_head"]
    made = [
        get_peft_model(model, LoraConfig(r=4, target_modules=targets, init_lora_weights=False))
        for model in (ours, theirs)
    ]
    made[1].load_state_dict(made[0].state_dict())
    ids, positions, labels = sequence(96)
    expected = plain_token_losses(made[1], ids, positions, labels)
    expected.sum().backward()
    out = LossModel(made[0], DIALS["recompute"])(ids, positions, labels, per_token=True)
    out.loss_sum.backward()
    assert out.loss_sum.item() == pytest.approx(expected.sum().item(), rel=1e-12)
    assert all("lora_" in name for name in gradients(made[0]))
    assert worst(gradients(made[0]), gradients(made[1])) < 1e-10

    frozen, reference = pair("llama", "float64")
    for model in (frozen, reference):
        model.get_input_embeddings().requires_grad_(False)
    plain_token_losses(reference, ids, positions, labels).sum().backward()
    LossModel(frozen, DIALS["recompute"])(ids, positions, labels).loss_sum.backward()
    assert worst(gradients(frozen), gradients(reference)) < 1e-10


def test_without_labels_the_loss_is_a_connected_zero():
    ours, _ = pair("llama", "float32")
    ids, positions, labels = sequence(64)
    out = LossModel(ours, DIALS["recompute"])(ids, positions, torch.full_like(labels, -100))
    out.loss_sum.backward()
    assert out.loss_sum.item() == 0
    assert out.tokens == 0
    assert out.weight_sum == 0
    assert all(weight.grad is not None and not weight.grad.any() for weight in ours.parameters())


def test_z_loss_is_weighted_like_its_token():
    ours, theirs = pair("llama", "float64")
    ids, positions, labels = sequence(64)
    weights = torch.rand(labels.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    logits = theirs(input_ids=ids, use_cache=False).logits
    lse = logits.logsumexp(-1)[:, :-1]
    nll = lse - logits[:, :-1].gather(-1, labels[:, :-1, None]).squeeze(-1)
    z = (weights[:, :-1] * 0.01 * lse**2).sum()
    expected = (weights[:, :-1] * nll).sum() + z
    expected.backward()
    out = LossModel(ours, DIALS["recompute"], z_loss=0.01)(ids, positions, labels, weights)
    out.loss_sum.backward()
    assert out.loss_sum.item() == pytest.approx(expected.item(), rel=1e-12)
    assert out.z_sum.item() == pytest.approx(z.item(), rel=1e-12)
    assert out.nll_sum.item() == pytest.approx((expected - z).item(), rel=1e-12)
    assert worst(gradients(ours), gradients(theirs)) < 1e-10


def test_evaluation_takes_only_the_logits_it_asks_for():
    ours, theirs = pair("llama", "float64")
    ids, positions, labels = sequence(64)
    at = torch.tensor([3, 63])
    with torch.no_grad():
        out = LossModel(ours, DIALS["recompute"])(ids, positions, labels, logits_at=at)
        expected = theirs(input_ids=ids, use_cache=False).logits[0, at]
    torch.testing.assert_close(out.logits, expected, rtol=1e-11, atol=1e-11)


def test_outputs_that_a_config_json_asks_for_change_nothing(tmp_path: Path):
    """return_dict=false makes transformers return tuples, output_hidden_states keeps every layer's states alive."""
    ours, theirs = pair("llama", "float32")
    ids, positions, labels = sequence(70)
    where, rows = torch.tensor([3, 40]), ids.numpy()
    model = LossModel(ours, DIALS["recompute"])
    before = [model(ids, positions, labels).loss_sum, token_losses(theirs, rows), one_process(theirs)(ids[0], where)]
    theirs.save_pretrained(tmp_path)
    asked = {"return_dict": False, "output_hidden_states": True}
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**values, **asked}))
    ours.config.update(asked)
    plain = load_plain(tmp_path)
    after = [model(ids, positions, labels).loss_sum, token_losses(plain, rows), one_process(plain)(ids[0], where)]
    assert all((a == b).all() for a, b in zip(before, after, strict=True))


def test_a_copy_of_the_model_trains_by_itself():
    ours, _ = pair("llama", "float32")
    model = LossModel(ours, DIALS["recompute"])
    twin = copy.deepcopy(model)
    ids, positions, labels = sequence(64)
    twin(ids, positions, labels).loss_sum.backward()
    assert not gradients(ours)
    assert gradients(twin.model)
