"""Wrong commands are refused before a rank starts: the launcher raises the error itself."""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from longctx.distributed import ranks as worlds
from longctx.errors import UserError
from longctx.run.training import settled_for_adapter, train_run
from longctx.train.train import checked_stages

from .made import TOKENIZER, config

TWO = {"nproc": 2}


def no_text(folder: Path) -> None:
    (folder / "picture.png").write_bytes(b"\x89PNG")


def other_field(folder: Path) -> None:
    (folder / "a.jsonl").write_text("\n".join(json.dumps({"body": "words"}) for _ in range(50)))


def latin(folder: Path) -> None:
    (folder / "a.txt").write_bytes("é".encode("latin-1") * 500)


def no_parquet(folder: Path) -> None:
    (folder / "a.parquet").write_bytes(b"not a table")


FOLDERS: dict[str, tuple[Callable[[Path], None] | None, str]] = {
    "missing": (None, "does not exist; give a file or folder of"),
    "empty": (lambda folder: None, "holds no usable file: of 0"),
    "no text": (no_text, "holds no usable file: of 1 that are not hidden, none is"),
    "empty files": (lambda folder: (folder / "a.jsonl").write_text("") and None, "holds nothing to read"),
    "an empty text": (
        lambda folder: (folder / "a.txt").write_text("\n") and None, r"none of the 1 records .* \(all are empty\)",
    ),
    "another field": (other_field, r"none of the 50 records looked at holds text \(a.jsonl:1: no field 'text'"),
    "not UTF-8": (latin, r"none of the 1 records looked at holds text \(a.txt: not UTF-8"),
    "no table": (no_parquet, "a.parquet cannot be read as parquet"),
}  # fmt: skip


@pytest.mark.parametrize("case", FOLDERS)
def test_documents_that_cannot_be_read(tmp_path: Path, case: str) -> None:
    make, words = FOLDERS[case]
    folder = tmp_path / "docs"
    if make is not None:
        folder.mkdir()
        make(folder)
    with pytest.raises(UserError, match=words):
        train_run(config(tmp_path / "run", folder, launch=TWO))
    assert not (tmp_path / "run").exists()


def test_data_that_cannot_fill_a_stage_is_found_by_the_launcher(tmp_path: Path, documents: Path) -> None:
    data = {
        "sources": {"text": {"kind": "text", "path": str(documents)}},
        "mixes": {"default": {"text": {"weight": 1.0, "length": {"prolong": {"share": 0.5}}}}},
    }
    stages = {"s8192": {"seq_len": 8192, "theta": 40000, "steps": 1, "batch": 2}}
    made = config(tmp_path / "run", documents, data=data, curriculum={"stages": stages}, launch=TWO)
    with pytest.raises(UserError, match=r"prolong\.share=0\.5 asks for documents of 8,192 tokens"):
        train_run(made)


SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "mix": ({"curriculum": {"mix": "other"}}, "mix=other is not one of data.mixes"),
    "zero": ({"engine": {"zero": 3}}, "engine.zero=3 is not something engine=ddp can do"),
    "timeout": ({"engine": {"timeout_seconds": 0}}, "engine.timeout_seconds=0 must be above 0"),
    "cuda": ({"engine": {"device": "cuda"}}, "engine.device=cuda, but this machine shows no CUDA device"),
    "profile": ({"profile": {"steps": [3]}}, "must be two steps"),
    "tokenizer": ({"model": {"tokenizer": "/nowhere"}}, "model.tokenizer=/nowhere is not a folder here and no hub id"),
    "disk": ({"checkpoint": {"spare_gib": 1e6}}, r"needs about 1,000,\d+\.\d+ GiB and its disk has .*accept=\[disk\]"),
    "cp": ({"parallel": {"cp": 3}}, "parallel.cp=3 does not divide the 2 ranks"),
}  # fmt: skip


@pytest.mark.parametrize("case", SETTINGS)
def test_settings_that_cannot_be(tmp_path: Path, documents: Path, case: str) -> None:
    import torch

    changes, words = SETTINGS[case]
    if case == "cuda" and torch.cuda.is_available():
        pytest.skip("this machine has one")
    with pytest.raises(UserError, match=words):
        train_run(config(tmp_path / "run", documents, launch=TWO, **changes))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"optim": {"beta1": 2}}, "optim.beta1=2 must be at most 1"),
        ({"optim": {"weight_decay": -1}}, "optim.weight_decay=-1 must be 0 or more"),
        ({"launch": {"threads": 0}}, "threads=0 must be 1 or more"),
        ({"guards": {"spike_factor": 0.5}}, "spike_factor=0.5 must be above 1"),
        ({"parallel": {"seq_len_per_rank": 0}}, "seq_len_per_rank=0 must be 1 or more"),
    ],
)
def test_numbers_that_torch_would_refuse_in_a_rank(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        config(tmp_path / "run", tmp_path, **changes)


def test_a_shape_of_which_transformers_makes_no_model(tmp_path: Path, documents: Path) -> None:
    """Its own validator names the two sizes; nothing has been tokenized by then."""
    run = tmp_path / "run"
    made = config(run, documents)
    assert made.model.init is not None
    odd = replace(made.model.init, hidden=36, heads=8, kv_heads=2, head_dim=8)
    with pytest.raises(UserError, match=r"makes no llama model.*\(36\) is not a multiple.*\(8\).*; change the value"):
        train_run(replace(made, model=replace(made.model, init=odd)))
    assert not list((run / "data").glob("shards/*"))


@pytest.mark.parametrize(
    ("values", "words"),
    [({"hidden_act": "sillu"}, "KeyError: 'sillu'"), ({"pad_token_id": 9999}, "Padding_idx must be")],
)
def test_a_config_json_of_which_transformers_makes_no_model(
    tmp_path: Path, documents: Path, values: dict[str, Any], words: str
) -> None:
    made = config(tmp_path / "run", documents, model=changed_base(tmp_path, **values), optim={"freeze": []})
    with pytest.raises(UserError, match=f"transformers makes no model from its config.json .*{words}"):
        train_run(made)
    assert not list((tmp_path / "run" / "data").glob("shards/*"))


def changed_base(folder: Path, **values: Any) -> dict[str, Any]:
    """A model to load whose config.json has other values; the key `model` of a run's config."""
    base = folder / "base"
    shutil.copytree(TOKENIZER, base)
    given = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**given, **values}))
    return {"init": None, "path": str(base)}


def test_a_models_dropout_is_left_out_and_training_says_so(
    tmp_path: Path, documents: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = changed_base(tmp_path, attention_dropout=0.125)
    made = config(tmp_path / "run", documents, model=model, optim={"freeze": []})
    checked_stages(settled_for_adapter(made), world=1, local_world=1)
    said = " ".join(capsys.readouterr().err.split())
    assert "has attention_dropout=0.125, and longctx trains without dropout" in said


def test_a_disk_that_is_too_small_can_be_accepted(tmp_path: Path, documents: Path) -> None:
    stages = {"s64": {"seq_len": 64, "theta": 10000, "steps": 1, "batch": 1}}
    made = config(
        tmp_path / "run", documents, curriculum={"stages": stages}, checkpoint={"spare_gib": 1e6}, accept=["disk"]
    )
    assert train_run(made) == 0


def test_folders_that_cannot_be_made(tmp_path: Path, documents: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"run_dir=.* cannot be made: .*file is a file"):
        train_run(config(tmp_path / "file" / "run", documents, launch=TWO))
    with pytest.raises(UserError, match=r"cache=.* cannot be made: .*file is a file"):
        train_run(config(tmp_path / "run", documents, launch=TWO, cache=str(tmp_path / "file")))


def test_wandb_online_without_an_account(tmp_path: Path, documents: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(UserError, match=r"logging\.wandb=online has no account to log to: run `wandb login`"):
        train_run(config(tmp_path / "run", documents, launch=TWO, logging={"wandb": "online"}))


def test_a_pattern_that_freezes_nothing(tmp_path: Path, documents: Path) -> None:
    from longctx.assets import tiny_model

    model = {"path": str(tiny_model()), "init": None}
    with pytest.raises(
        UserError, match=r"optim\.freeze='\*nothing\*' matches no parameter; names look like model\.model"
    ):
        train_run(config(tmp_path / "run", documents, launch=TWO, model=model, optim={"freeze": ["*nothing*"]}))


def test_an_occupied_port_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        monkeypatch.setenv("MASTER_ADDR", "localhost")
        monkeypatch.setenv("MASTER_PORT", str(port))
        with pytest.raises(UserError, match=f"MASTER_PORT={port}: the port is in use by another process"):
            worlds.join(0, 2, 5.0)
    monkeypatch.delenv("MASTER_ADDR")
    with pytest.raises(UserError, match=r"WORLD_SIZE=2 says that a launcher started this rank, but .*MASTER_ADDR"):
        worlds.join(0, 2, 5.0)
