"""Models are drawn reproducibly, loaded whole, and refused with the reason and the layer."""

from __future__ import annotations

import json

import pytest
import torch

from longctx.config.base import build
from longctx.config.model import ModelConfig
from longctx.errors import UserError
from longctx.model import LossModel, init_from, load, model_of
from tests.model.conftest import sequence, tiny


@pytest.fixture
def folder(tmp_path):
    init_from(tiny()).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def edit(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_load_gives_the_saved_weights_under_our_attention(folder):
    model = load(str(folder))
    drawn = init_from(tiny())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), drawn.parameters(), strict=True))
    assert model.config._attn_implementation == "longctx"
    assert load(str(folder), dtype="bfloat16").dtype == torch.bfloat16


def test_drawing_is_reproducible_and_leaves_the_global_state_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    a, b = init_from(tiny(seed=1)), init_from(tiny(seed=2))
    assert torch.equal(torch.rand(3), expected)
    assert not torch.equal(a.lm_head.weight, b.lm_head.weight)


def test_the_configured_rotary_precision_is_set():
    config = build(ModelConfig, {"init": {**vars(tiny())}, "rotary": "float64"}, origin="test")
    assert model_of(config).model.rotary_emb.inv_freq.dtype == torch.float64


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "gpt2", "rope_parameters": None}, "'gpt2'.*no rotary"),
        ({"model_type": "olmo2"}, "'olmo2'.*not been checked against transformers"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0"),
        (
            {"model_type": "mistral", "sliding_window": 64},
            "layer 0 attends to a window of 64",
        ),
        (
            {
                "model_type": "qwen2", "use_sliding_window": True, "sliding_window": 64,
                "layer_types": ["full_attention", "sliding_attention"],
            },
            "layer 1 attends to a window of 64",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_trained_exactly_is_refused(folder, changes, words):
    edit(folder, **changes)
    with pytest.raises(UserError, match=words):
        load(str(folder))


def test_missing_paths_and_incomplete_folders(folder, tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        load(str(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no config\.json"):
        load(str(tmp_path / "empty"))
    edit(folder, num_hidden_layers=3)
    with pytest.raises(UserError, match="9 weights of the model that config"):
        load(str(folder))


def test_the_family_forward_still_runs_and_ours_needs_a_layout():
    ids, _positions, _labels = sequence(32)
    sdpa = init_from(tiny(), attention="sdpa")
    before = sdpa(input_ids=ids).logits
    LossModel(sdpa, ModelConfig(init=tiny()).memory)
    torch.testing.assert_close(sdpa(input_ids=ids).logits, before)
    with pytest.raises(ValueError, match="no layout"):
        init_from(tiny())(input_ids=ids)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({}, "neither path nor init"),
        ({"path": "x", "memory": {"keep_matmuls": "auto"}}, "needs budget_gib"),
        ({"path": "x", "memory": {"activation_checkpointing": False, "offload_activations": True}}, "do not apply"),
        ({"path": "x", "memory": {"fnn_block": 8}}, "did you mean memory.ffn_block?"),
        ({"path": "x", "dtype": "float8"}, "dtype='float8' is not one of"),
    ],
)
def test_bad_settings_are_named(values, words):
    with pytest.raises(UserError, match=words):
        build(ModelConfig, values, origin="configs/train.yaml")
