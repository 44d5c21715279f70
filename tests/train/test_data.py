"""Training's requirements on its data: documents fill every stage, ids fit, and the plan is stored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from longctx.attention import ContextParallel
from longctx.distributed.transport import SingleRankTransport
from longctx.errors import UserError
from longctx.topology import split
from longctx.train import metrics
from longctx.train.batch import micro_batch
from longctx.train.train import train

from .made import VOCAB, MadeData, config, write_documents
from .test_run import one_stage, wandb_rows


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_documents(tmp_path_factory.mktemp("documents") / "docs")


def data(documents: Path, **more: Any) -> dict[str, Any]:
    prolong = {"text": {"weight": 1.0, "length": {"prolong": {"share": 0.5}}}}
    return {
        "sources": {"text": {"kind": "text", "path": str(documents)}},
        "mixes": {"default": {"text": 1.0}, "long": prolong},
        **more,
    }


def test_a_later_stage_that_cannot_be_filled_is_refused_before_the_first_step(tmp_path: Path, documents: Path) -> None:
    stages = {
        "s64": {"seq_len": 64, "theta": 10000, "steps": 2, "batch": 4},
        "s8192": {"seq_len": 8192, "theta": 40000, "steps": 2, "batch": 2, "mix": "long"},
    }
    made = config(tmp_path / "run", documents, data=data(documents), curriculum={"stages": stages})
    with pytest.raises(UserError, match=r"stage s8192/train: prolong\.share=0\.5 asks for documents of 8,192 tokens"):
        train(made)
    assert not (tmp_path / "run/metrics.jsonl").exists()


def test_a_tokenizer_beyond_the_models_vocabulary_is_refused(tmp_path: Path, documents: Path) -> None:
    init = {"layers": 1, "hidden": 32, "heads": 4, "kv_heads": 2, "ffn": 64, "vocab": VOCAB // 2, "window": 64}
    made = config(tmp_path / "run", documents, model={"init": init}, curriculum=one_stage(2))
    with pytest.raises(UserError, match=r"gives ids up to \d+ and the model has vocab_size=256"):
        train(made)


def test_without_held_out_documents_training_goes_on(tmp_path: Path, documents: Path, capsys: Any) -> None:
    made = config(tmp_path / "run", documents, data=data(documents, heldout=0.0), curriculum=one_stage(2))
    assert train(made) == 0
    assert len(metrics.read(tmp_path / "run/metrics.jsonl")) == 2
    assert capsys.readouterr().err.count("evaluate.heldout_sequences=0") == 1


def test_the_plan_of_a_stage_stands_in_its_metrics(tmp_path: Path, documents: Path) -> None:
    pytest.importorskip("wandb")
    logging = {"display": "none", "wandb": "offline"}
    assert train(config(tmp_path / "run", documents, logging=logging, curriculum=one_stage(2))) == 0
    lines = metrics.read(tmp_path / "run/metrics.jsonl")
    plan = lines[0]["data"]
    assert 0 <= plan["padding"] < 1
    assert 0 < plan["cut"] <= 1  # documents have a few hundred tokens, sequences 64
    assert 0 < plan["epochs"]["text"] < 1
    assert [line["data"] for line in lines] == [plan] * 2
    (file,) = (tmp_path / "run/wandb").glob("offline-run-*/*.wandb")
    row = wandb_rows(file)[0]
    assert row["data/padding"] == pytest.approx(plan["padding"])
    assert row["data/cut"] == pytest.approx(plan["cut"])


@pytest.mark.parametrize(("most", "named"), [(1.0, False), (2.5, True)])
def test_weights_that_are_all_1_are_left_to_the_model(most: float, named: bool) -> None:
    """A token of weight 0 has no label either way, and the batch's weight is the same."""
    data = MadeData(48, 2, seed=1)
    data.weights_of = [np.minimum(weights, np.float32(most)) for weights in data.weights_of]
    batch = micro_batch(data, [0, 1], ContextParallel(SingleRankTransport(), split(1, 1)), "zigzag")
    assert ("weights" in batch.inputs) is named
    labels = batch.inputs["labels"]
    given = batch.inputs["weights"] if named else (labels != -100).float()
    assert float(given.sum()) == batch.weight > 0
    assert (labels == -100).any()
    assert bool((given[labels == -100] == 0).all())
