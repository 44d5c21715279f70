"""An exported folder is whole, sharded, served with the new theta and window by old and new readers."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from longctx.config.model import MemoryConfig, ModelConfig
from longctx.errors import RunFailed
from longctx.model import LossModel, export, load, model_of, set_rope
from longctx.model.shards import verify
from tests.model.conftest import sequence, tiny

ROPE = {"rope_type": "default", "rope_theta": 1_000_000.0}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 256}


@pytest.fixture
def source():
    return ModelConfig(init=tiny(tie_embeddings=True))


@pytest.mark.parametrize("rope", [ROPE, YARN])
def test_the_exported_model_is_the_trained_one(source, tmp_path, rope):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(Path(__file__).parents[2] / "longctx/assets/tiny")
    trained = LossModel(model_of(source), MemoryConfig())
    set_rope(trained.model, rope, 1024)
    out = export(
        trained.named_parameters(),
        source,
        tokenizer,
        tmp_path / "out",
        rope=rope,
        window=1024,
        shard_bytes=9000,
    )
    index = json.loads((out / "model.safetensors.index.json").read_text())
    shards = sorted(path.name for path in out.glob("*.safetensors"))
    assert len(shards) > 2
    assert set(index["weight_map"].values()) == set(shards)
    assert "lm_head.weight" not in index["weight_map"]
    with safe_open(out / shards[0], "pt") as file:
        assert all(index["weight_map"][name] == shards[0] for name in file.keys())  # noqa: SIM118
    config = json.loads((out / "config.json").read_text())
    assert config["rope_theta"] == rope["rope_theta"] == config["rope_parameters"]["rope_theta"]
    assert config["max_position_embeddings"] == 1024
    assert (config["rope_scaling"] is None) == (rope is ROPE)
    assert config["eos_token_id"] == tokenizer.eos_token_id
    assert json.loads((out / "tokenizer_config.json").read_text())["model_max_length"] == 1024
    assert (out / "generation_config.json").is_file()
    again = LossModel(load(str(out)), MemoryConfig())
    batch = sequence(300)
    assert torch.equal(again(*batch).loss_sum, trained(*batch).loss_sum)
    assert not list(tmp_path.glob(".out*"))


def test_exporting_again_replaces_the_folder_and_keeps_its_source(source, tmp_path):
    trained = LossModel(model_of(source), MemoryConfig())
    first = export(trained.named_parameters(), source, None, tmp_path / "a", rope=ROPE, window=512)
    second = export(trained.model.named_parameters(), str(first), None, first, rope=ROPE, window=2048)
    assert load(str(second)).config.max_position_embeddings == 2048


def test_a_yarn_rope_in_a_wider_window_is_exported_and_read_without_an_alarm(source, tmp_path, monkeypatch):
    """A theta rule keeps the factor; transformers would say that it does not match the window and must be corrected."""
    said: list[str] = []
    handler = logging.Handler()
    monkeypatch.setattr(handler, "emit", lambda record: said.append(record.getMessage()))
    monkeypatch.setattr(logging.getLogger("transformers.modeling_rope_utils"), "handlers", [handler])
    model = model_of(source)
    rope = {"rope_type": "yarn", "rope_theta": 40000.0, "factor": 2.375, "original_max_position_embeddings": 128}
    set_rope(model, rope, 1024)
    out = export(model.named_parameters(), source, None, tmp_path / "out", rope=rope, window=1024)
    assert load(str(out)).config.rope_parameters["factor"] == 2.375
    assert said == []


def test_ranks_that_do_not_write_only_draw_the_stream(source, tmp_path):
    drawn = []
    stream = ((name, weight) for name, weight in model_of(source).named_parameters() if drawn.append(name) is None)
    export(stream, source, None, tmp_path / "out", rope=ROPE, window=512, write=False)
    assert len(drawn) == 20
    assert not (tmp_path / "out").exists()


def test_missing_unknown_and_repeated_weights_fail_and_leave_the_old_folder(source, tmp_path):
    model = model_of(source)
    out = export(model.named_parameters(), source, None, tmp_path / "out", rope=ROPE, window=512)
    weights = list(model.named_parameters())
    with pytest.raises(RunFailed, match=r"1 weights did not come.*model\.norm\.weight"):
        export(weights[:-1], source, None, out, rope=ROPE, window=512)
    with pytest.raises(RunFailed, match="lora_A is no weight"):
        export([("lora_A", weights[0][1])], source, None, out, rope=ROPE, window=512)
    assert load(str(out)).config.max_position_embeddings == 512


def test_a_flipped_byte_is_noticed(source, tmp_path):
    out = export(model_of(source).named_parameters(), source, None, tmp_path / "out", rope=ROPE, window=512)
    hashes = json.loads((out / "hashes.json").read_text())
    verify(out, hashes)
    path = out / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    with pytest.raises(RuntimeError, match="reads back differently"):
        verify(out, hashes)
