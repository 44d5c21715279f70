"""The dtype of a run: from config.json or the stored weights, in all spellings, and the dtype of the export."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from longctx import dtype as dtypes
from longctx.config.base import build
from longctx.config.model import InitConfig, ModelConfig
from longctx.errors import UserError
from longctx.model import init_from, load
from longctx.run.train import run
from longctx.train import runfolder

from .train.made import TOKENIZER, VOCAB, config, write_documents

SMALL = InitConfig(layers=1, hidden=32, heads=4, kv_heads=2, ffn=48, vocab=VOCAB, window=64, seed=7)


@pytest.mark.parametrize(
    ("said", "dtype", "source"),
    [
        ({"dtype": "bfloat16"}, "bfloat16", "config.json"),
        ({"torch_dtype": "bfloat16"}, "bfloat16", "config.json"),
        ({"torch_dtype": "torch.bfloat16"}, "bfloat16", "config.json"),
        ({"dtype": "float32", "torch_dtype": "bfloat16"}, "float32", "config.json"),  # as transformers 5 reads both
        ({"dtype": None, "torch_dtype": "float64"}, "float64", "config.json"),
        ({"dtype": "float16"}, "bfloat16", "float16, which is trained as bfloat16"),
        ({}, "float32", "neither config.json nor a weight here names one"),
        ({"dtype": "auto"}, "float32", "neither config.json"),
    ],
)
def test_auto_is_what_config_json_says(tmp_path, said, dtype, source):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **said}))
    model, where = dtypes.resolve(ModelConfig(path=str(tmp_path)))
    assert model.dtype == dtype
    assert source in where


def test_auto_reads_the_stored_weights_where_config_json_is_silent(tmp_path):
    init_from(SMALL, dtype="bfloat16").save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    silent = {key: value for key, value in json.loads(file.read_text()).items() if "dtype" not in key}
    file.write_text(json.dumps(silent))
    assert dtypes.found(str(tmp_path)) == ("bfloat16", "the stored weights, config.json names none")
    assert str(load(str(tmp_path)).dtype) == "torch.bfloat16"


def test_what_cannot_be_trained_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"dtype": "float8_e4m3fn"}))
    with pytest.raises(UserError, match=r"stored in float8_e4m3fn, which cannot be trained"):
        dtypes.found(str(tmp_path))


@pytest.mark.parametrize(
    ("word", "dtype"),
    [("bf16", "bfloat16"), ("BF16", "bfloat16"), ("torch.bfloat16", "bfloat16"), ("fp32", "float32"),
     ("float", "float32"), ("fp64", "float64"), ("double", "float64"), ("auto", "auto")],
)  # fmt: skip
def test_spellings(word, dtype):
    assert build(ModelConfig, {"path": "x", "dtype": word}, origin="test").dtype == dtype


@pytest.mark.parametrize("word", ["half", "fp16", "float16", "bfloat", "int8"])
def test_other_words_are_refused(word):
    with pytest.raises(UserError, match=r"dtype='\S+' is not one of 'auto'"):
        build(ModelConfig, {"path": "x", "dtype": word}, origin="test")


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_documents(tmp_path_factory.mktemp("documents") / "docs")


@pytest.mark.parametrize("stored", ["bfloat16", "float16"])
def test_a_model_comes_back_in_the_dtype_it_was_trained_in(tmp_path, documents, capfd, stored):
    """bfloat16 stays bfloat16 and float16 becomes bfloat16; the adapter merges into a target of the base's dtype."""
    from longctx.config.lora import MergeConfig
    from longctx.lora.merge import merge

    base = tmp_path / "base"
    init_from(SMALL, dtype="bfloat16").to(getattr(torch, stored)).save_pretrained(base)
    assert json.loads((base / "config.json").read_text())["dtype"] == stored
    stages = {"s128": {"seq_len": 128, "theta": 40000, "steps": 2, "batch": 2}}
    made = config(
        tmp_path / "run", documents, model={"init": None, "path": str(base), "tokenizer": TOKENIZER},
        curriculum={"stages": stages, "lr": {"peak": 1e-2}}, after_training={"lora": {"enabled": True, "rank": 8}},
    )  # fmt: skip
    assert run(made) == 0
    said = capfd.readouterr().err
    first = next(line for line in said.splitlines() if "weights" in line)
    assert first == (
        "bfloat16 weights with float32 masters, gradients and optimizer in float32, attention kernel torch_cpu on cpu"
    )
    assert ("float16, which is trained as bfloat16" in said) == (stored == "float16")
    assert runfolder.read(tmp_path / "run" / "config.yaml").model.dtype == "bfloat16"
    out = tmp_path / "run" / "stages" / "s128" / "model"
    merge(MergeConfig(target=str(base), adapter=[str(tmp_path / "run" / "adapter")], out=str(tmp_path / "merged")))
    for folder, wanted in ((out, "bfloat16"), (tmp_path / "merged", stored)):
        said_there = json.loads((folder / "config.json").read_text())
        assert said_there.get("dtype", said_there.get("torch_dtype")) == wanted
        kinds = {str(tensor.dtype) for tensor in load_file(folder / "model.safetensors").values()}
        assert kinds == {f"torch.{wanted}"}
    assert (out / "model.safetensors").stat().st_size < 1.1 * (base / "model.safetensors").stat().st_size + 20_000


def test_a_run_keeps_its_dtype_whatever_auto_would_say(tmp_path, documents):
    base = tmp_path / "base"
    init_from(SMALL, dtype="bfloat16").save_pretrained(base)
    model = {"init": None, "path": str(base), "tokenizer": TOKENIZER}
    wide = config(tmp_path / "run", documents, model={**model, "dtype": "float32"})
    runfolder.prepare(wide)
    auto = config(tmp_path / "run", documents, model=model)
    assert runfolder.with_dtype(auto).model.dtype == "float32"
    runfolder.prepare(auto)
    assert runfolder.read(tmp_path / "run" / "config.yaml").model.dtype == "float32"
    mark = tmp_path / "run/stages/s64/checkpoints/step00000002/manifest.json"  # without a step it has no identity
    mark.parent.mkdir(parents=True)
    mark.write_text("{}")
    with pytest.raises(UserError, match=r"model.dtype was 'float32', now 'bfloat16'"):
        runfolder.prepare(config(tmp_path / "run", documents, model={**model, "dtype": "bf16"}))
