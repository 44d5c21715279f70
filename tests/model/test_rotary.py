"""The rotary embedding is rebuilt, checked, and exact in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from longctx.errors import UserError
from longctx.model import init_from, set_rope
from longctx.model.rotary import Rotate, check_inv_freq
from longctx.rope import inv_freq
from tests.model.conftest import sequence, tiny

ABF = {"rope_type": "default", "rope_theta": 2_804_339_835.0}
YARN = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 256,
}  # fmt: skip


@pytest.mark.parametrize("rope", [ABF, YARN])
@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_set_rope_rebuilds_the_frequencies(rope, precision):
    model = init_from(tiny())
    before = model.model.rotary_emb.inv_freq.clone()
    set_rope(model, rope, 1024, precision=precision)
    found = model.model.rotary_emb.inv_freq.double().numpy()
    assert not np.allclose(found, before.double().numpy())
    np.testing.assert_allclose(found, inv_freq(rope, 16, window=1024), rtol=2e-6)
    assert model.config.max_position_embeddings == 1024
    assert model.config.rope_parameters["rope_theta"] == rope["rope_theta"]
    set_rope(model, ABF, 2048, precision="float32")  # and back from the exact module
    assert type(model.model.rotary_emb).__name__ == "LlamaRotaryEmbedding"


def test_exact_angles_stay_exact_and_fp32_ones_do_not():
    model = init_from(tiny(head_dim=128, hidden=64))
    positions = torch.arange(2**20 - 256, 2**20)[None]
    exact = inv_freq(ABF, 128, window=2**20)
    truth = np.cos(positions.numpy()[0, :, None] * exact)
    errors = {}
    for precision in ("float32", "float64"):
        set_rope(model, ABF, 2**20, precision=precision)
        cos, _ = model.model.rotary_emb(torch.zeros(1), positions)
        errors[precision] = np.abs(cos[0, :, :64].double().numpy() - truth).max()
    assert errors["float64"] < 1e-7
    assert 1e-3 < errors["float32"] < 0.1


def test_a_cast_of_the_model_leaves_exact_frequencies_alone():
    model = init_from(tiny())
    set_rope(model, ABF, 2**20, precision="float64")
    model.to(torch.bfloat16)
    np.testing.assert_array_equal(model.model.rotary_emb.inv_freq.numpy(), inv_freq(ABF, 16, window=2**20))


def test_a_rope_that_was_not_rebuilt_is_noticed():
    model = init_from(tiny())
    with pytest.raises(RuntimeError, match="not rebuilt"):
        check_inv_freq(model.model.rotary_emb.inv_freq, inv_freq(ABF, 16, window=512), "theta 2.8e9")


def test_a_rope_that_moves_with_the_length_is_refused():
    with pytest.raises(UserError, match=r"dynamic.*one fixed set"):
        set_rope(init_from(tiny()), {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}, 1024)


def test_turning_is_transformers_own_and_its_gradient_is_the_turn_back():
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    model = init_from(tiny(), dtype="float64")
    _, positions, _ = sequence(24)
    x = torch.randn(1, 24, 4, 16, dtype=torch.float64, requires_grad=True)
    cos, sin = model.model.rotary_emb(x, positions[None])
    expected, _ = apply_rotary_pos_emb(x.transpose(1, 2), x.transpose(1, 2), cos, sin)
    torch.testing.assert_close(Rotate.apply(x, cos, sin), expected, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(lambda y: Rotate.apply(y, cos, sin), x)
