"""A hub dataset, read through Hugging Face datasets; without a network, from a folder in the hub's layout."""

from __future__ import annotations

import re
import tracemalloc
from pathlib import Path

import pytest

from longctx.config.base import build
from longctx.config.data import DataConfig, SourceConfig
from longctx.data.documents import Tally
from longctx.data.files import read
from longctx.data.sources import source_units
from longctx.data.stage_opening import open_source
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


def test_rows_are_written_as_they_come(tmp_path, monkeypatch):
    """A request for many rows takes no more memory than one for a few."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    folder = tmp_path / "owner" / "name"
    (folder / "data").mkdir(parents=True)
    for number in range(8):
        rows = [f"{number} {row} " + "x" * 20_000 for row in range(250)]
        datasets.Dataset.from_dict({"body": rows}).to_parquet(folder / f"data/train-{number:05d}-of-00008.parquet")
    source = SourceConfig(kind="hub", name=str(folder), field="body", rows=1900)
    tracemalloc.start()
    try:
        (unit,) = source_units("x", source, tmp_path / "cache")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    documents = list(read(unit, Tally()))
    assert [d.content.split()[:2] for d in documents] == [[str(n // 250), str(n % 250)] for n in range(1900)]
    assert peak < 1900 * 20_000 / 2


def test_a_dataset_without_rows_is_named(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    (tmp_path / "name").mkdir()
    datasets.Dataset.from_dict({"body": ["one"]}).to_json(tmp_path / "name/train.jsonl")
    source = SourceConfig(kind="hub", name=str(tmp_path / "name"), field="body", rows=1)
    (unit,) = source_units("x", source, tmp_path / "cache")
    Path(unit.path).write_text("")
    with pytest.raises(UserError, match=r"data\.sources\.x\.name=.*/name holds nothing to read"):
        source_units("x", source, tmp_path / "cache")


def test_a_dataset_that_is_not_there_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    source = SourceConfig(kind="hub", name=str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"data\.sources\.x\.name=.*nowhere.*cannot be loaded"):
        source_units("x", source, tmp_path)


@pytest.mark.parametrize(
    ("kind", "remedy"), [("hub", "path={0} instead and data.sources.x.kind=text"), ("chat", "path={0} instead (data")]
)
def test_a_saved_dataset_named_as_a_hub_dataset_is_told_how_it_is_read(kind, remedy, tmp_path):
    (tmp_path / "dataset_dict.json").write_text("{}")
    with pytest.raises(UserError, match=re.escape(remedy.format(tmp_path))):
        source_units("x", SourceConfig(kind=kind, name=str(tmp_path)), tmp_path / "cache")
