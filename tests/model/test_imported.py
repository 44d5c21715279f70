"""`longctx import`: a GGUF file becomes a folder that loads, trains and serves; others are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from longctx.config.imports import ImportConfig
from longctx.errors import UserError
from longctx.model.imported import import_gguf
from longctx.rope import read_rope
from longctx.rope.frequencies import inv_freq

gguf = pytest.importorskip("gguf", reason="`longctx import` needs the package gguf")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """A tiny Llama as llama.cpp stores it, and its tensors under transformers' names."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    return path, write_gguf(path)


def write_gguf(path: Path, scale: Callable[[Any], None] = lambda writer: None) -> dict[str, torch.Tensor]:
    """Write the file, with what `scale` adds for its rope; returns its tensors under transformers' names."""
    hidden, ffn, vocab, heads = 32, 64, 270, 4
    make = torch.Generator().manual_seed(0)
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(256)
    writer.add_embedding_length(hidden)
    writer.add_block_count(1)
    writer.add_feed_forward_length(ffn)
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads)
    writer.add_rope_freq_base(20000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(vocab)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    tokens = ["<s>", "</s>", "t", "0", "1", *(f"t{i}" for i in range(vocab - 5))]
    writer.add_token_list(tokens)
    writer.add_token_merges(["t 1", "t 0"])  # a list of one would be read as text
    writer.add_token_types([3, 3] + [1] * (vocab - 2))
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    shapes = {
        "token_embd.weight": ("model.embed_tokens.weight", (vocab, hidden)),
        "output.weight": ("lm_head.weight", (vocab, hidden)),
        "output_norm.weight": ("model.norm.weight", (hidden,)),
        "blk.0.attn_norm.weight": ("model.layers.0.input_layernorm.weight", (hidden,)),
        "blk.0.ffn_norm.weight": ("model.layers.0.post_attention_layernorm.weight", (hidden,)),
        "blk.0.attn_v.weight": ("model.layers.0.self_attn.v_proj.weight", (hidden, hidden)),
        "blk.0.attn_output.weight": ("model.layers.0.self_attn.o_proj.weight", (hidden, hidden)),
        "blk.0.attn_q.weight": ("", (hidden, hidden)),  # stored with its rows permuted
        "blk.0.attn_k.weight": ("", (hidden, hidden)),
        "blk.0.ffn_gate.weight": ("model.layers.0.mlp.gate_proj.weight", (ffn, hidden)),
        "blk.0.ffn_up.weight": ("model.layers.0.mlp.up_proj.weight", (ffn, hidden)),
        "blk.0.ffn_down.weight": ("model.layers.0.mlp.down_proj.weight", (hidden, ffn)),
    }
    scale(writer)
    made: dict[str, torch.Tensor] = {}
    for name, (ours, shape) in shapes.items():
        tensor = torch.randn(shape, generator=make)
        writer.add_tensor(name, tensor.numpy())
        if ours:
            made[ours] = tensor
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return made


def test_a_gguf_file_becomes_a_folder(file, tmp_path):
    from safetensors.torch import load_file

    from longctx.model import load

    path, tensors = file
    found = import_gguf(ImportConfig(gguf=str(path), out=str(tmp_path / "out")))
    assert (found["family"], found["window"], found["theta"]) == ("llama", 256, 20000.0)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    for name, tensor in tensors.items():
        assert torch.equal(stored[name], tensor.bfloat16()), name
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 20000.0
    assert config["dtype"] == "bfloat16"
    assert "quantization_config" not in config
    model = load(str(tmp_path / "out"), attention="sdpa")
    assert torch.isfinite(model(torch.tensor([[0, 5, 9]])).logits).all()
    assert not list(tmp_path.glob(".*")), "a partial folder is left"
    assert len({written.stat().st_mode for written in (tmp_path / "out").iterdir()}) == 1, "others cannot read a file"


def test_what_cannot_be_imported_is_explained(file, tmp_path, monkeypatch):
    path, _ = file
    (tmp_path / "text.gguf").write_text("no model")
    (tmp_path / "half.gguf").write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    for changes, words in (
        ({"gguf": str(tmp_path / "nothing.gguf")}, "is no file"),
        ({"gguf": str(tmp_path / "text.gguf")}, "is not a GGUF file"),
        ({"gguf": str(tmp_path / "half.gguf")}, r"cannot read it .*more than [0-9,]+ bytes, the file was cut short"),
        ({"out": str(tmp_path / "full")}, "exists; remove it"),
    ):
        with pytest.raises(UserError, match=words):
            import_gguf(ImportConfig(**{"gguf": str(path), "out": str(tmp_path / "out"), **changes}))
    monkeypatch.setattr("longctx.model.imported.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install gguf"):
        import_gguf(ImportConfig(gguf=str(path), out=str(tmp_path / "out")))


def _linear(writer):
    writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
    writer.add_rope_scaling_factor(4.0)


def _yarn(writer):
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(4.0)
    writer.add_rope_scaling_orig_ctx_len(256)
    writer.add_rope_scaling_yarn_beta_fast(16.0)


PLAIN = {"rope_type": "default", "rope_theta": 20000.0}
LLAMA3 = {"rope_theta": 20000.0, "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3["original_max_position_embeddings"] = 2048


def _llama3(writer, spoilt: float = 1.0):
    factors = inv_freq(PLAIN, 8, window=256) / inv_freq(LLAMA3, 8, window=256)
    writer.add_tensor("rope_freqs.weight", (factors * np.array([1, 1, 1, spoilt])).astype(np.float32))


@pytest.mark.parametrize(
    ("scale", "expected", "window"),
    [
        (_linear, {"rope_type": "linear", "factor": 4.0}, 256),
        (_yarn, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256, "beta_fast": 16.0}, 1024),
        (_llama3, LLAMA3, 256),
    ],
)
def test_a_scaled_rope_is_carried(tmp_path, scale, expected, window):
    """transformers reads theta alone, with which Llama 3.1 would turn its slow pairs eight times too fast."""
    write_gguf(tmp_path / "scaled.gguf", scale)
    found = import_gguf(ImportConfig(gguf=str(tmp_path / "scaled.gguf"), out=str(tmp_path / "out")))
    rope = read_rope(tmp_path / "out")
    assert (rope.window, found["window"]) == (window, window)
    wanted = {"rope_theta": 20000.0, **expected}
    assert {key: rope.parameters[key] for key in wanted} == wanted
    assert np.array_equal(rope.frequencies(), inv_freq(wanted, 8, window=window))


def test_a_scaling_without_a_counterpart_is_refused(tmp_path):
    for name, scale, words in (
        ("freqs", lambda writer: _llama3(writer, spoilt=0.9), "not Llama 3.1's rule"),
        ("long", lambda writer: writer.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE), "type=longrope"),
        ("attn", lambda writer: (_yarn(writer), writer.add_rope_scaling_yarn_attn_factor(0.5)), "attn_factor=0.5"),
    ):
        write_gguf(tmp_path / f"{name}.gguf", scale)
        with pytest.raises(UserError, match=words):
            import_gguf(ImportConfig(gguf=str(tmp_path / f"{name}.gguf"), out=str(tmp_path / "out")))
        assert not (tmp_path / "out").exists()
