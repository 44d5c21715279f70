"""A hub dataset, read through Hugging Face datasets; without a network, from a folder in the hub's layout."""

from __future__ import annotations

from pathlib import Path

import pytest

from longctx.config.base import build
from longctx.config.data import DataConfig, SourceConfig
from longctx.data.opening import open_source
from longctx.data.sources import source_units
from longctx.errors import UserError

ROWS = [f"Row {number} of a dataset says that {number} is {number}." for number in range(30)]


@pytest.fixture
def dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A dataset of 30 rows in two parquet files; datasets' cache goes to a folder of this test."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    folder = tmp_path / "owner" / "name"
    (folder / "data").mkdir(parents=True)
    for number, rows in enumerate((ROWS[:20], ROWS[20:])):
        whole = datasets.Dataset.from_dict({"body": rows, "id": list(range(len(rows)))})
        whole.to_parquet(folder / "data" / f"train-{number:05d}-of-00002.parquet")
    return folder


def texts(folder: Path, tokenizer, cache: Path, **changes) -> list[str]:
    source = {"kind": "hub", "name": str(folder), "field": "body", **changes}
    config = build(DataConfig, {"sources": {"hub": source}, "mixes": {"m": {"hub": 1.0}}}, origin="test")
    corpus = open_source("hub", config, tokenizer, cache, split="train")
    held = open_source("hub", config, tokenizer, cache, split="heldout")
    whole = [part.read(n, 0, int(part.lengths[n])) for part in (corpus, held) for n in range(len(part))]
    return sorted(tokenizer.decode(tokens, skip_special_tokens=True) for tokens in whole)


def test_every_row_of_a_hub_dataset_is_a_document(dataset, tokenizer, tmp_path):
    assert texts(dataset, tokenizer, tmp_path / "cache") == sorted(ROWS)


def test_rows_reads_no_more_than_asked_for(dataset, tokenizer, tmp_path):
    assert texts(dataset, tokenizer, tmp_path / "cache", rows=7) == sorted(ROWS[:7])


def test_a_dataset_that_is_not_there_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    source = SourceConfig(kind="hub", name=str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"data\.sources\.x\.name=.*nowhere.*cannot be loaded"):
        source_units("x", source, tmp_path)
