"""Later starts of a run: on other ranks, up to another stage, and with documents that are drawn otherwise."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from longctx.data import mixing
from longctx.errors import UserError
from longctx.run.training import train_run
from longctx.signals import SAVED_AND_REQUEUE
from longctx.train.checkpoint import State
from longctx.train.resume import check_plan

from .made import config, losses, write_documents
from .test_run import stop_after


def test_a_start_must_hold_the_stages_that_it_trains_and_no_others(
    tmp_path: Path, documents: Path, undisturbed: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """s128 divides over three ranks alone; then s64, which is finished, is given a cp that these do not have."""
    run, three = tmp_path / "run", {"cp_by_stage": {"s128": 3}}
    assert train_run(config(run, documents, launch={"until": "s64"}, parallel=three)) == 0
    said = " ".join(capfd.readouterr().err.split())
    assert "behind launch.until=s64, which ends this start: parallel.cp_by_stage.s128=3 does not divide" in said
    with pytest.raises(UserError, match=r"cp_by_stage\.s128=3 does not divide the 1 ranks"):
        train_run(config(run, documents, parallel=three))
    assert losses(run) == losses(undisturbed)[:5]
    assert train_run(config(run, documents, parallel={"cp_by_stage": {"s64": 3}})) == 0
    assert losses(run) == losses(undisturbed)


def test_a_start_until_a_stage_that_is_trained_trains_nothing(
    tmp_path: Path,
    documents: Path,
    undisturbed: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """As the first job of `longctx submit` with a job for each stage, where it is submitted again."""
    run = tmp_path / "run"
    with monkeypatch.context() as patched:
        stop_after(patched, 6)
        assert train_run(config(run, documents)) == SAVED_AND_REQUEUE
    assert train_run(config(run, documents, launch={"until": "s64"})) == 0
    assert "launch.until=s64: every stage up to it is trained" in capfd.readouterr().err
    assert len(losses(run)) == 6
    assert train_run(config(run, documents, launch={"until": "s128"})) == 0
    assert losses(run) == losses(undisturbed)


def test_other_sequences_under_a_cursor_are_refused_or_meant(
    tmp_path: Path, documents: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Another release of numpy may give other random numbers, and so another draw of the documents."""
    run, drawn = tmp_path / "run", mixing.rng_of
    with monkeypatch.context() as patched:
        stop_after(patched, 6)
        assert train_run(config(run, documents)) == SAVED_AND_REQUEUE
    monkeypatch.setattr(mixing, "rng_of", lambda seed, *words: drawn(seed + 1, *words))
    words = "stage s128 stopped after 2 of its 8 sequences of 128 tokens, and what is left is drawn otherwise now"
    with pytest.raises(UserError, match=f"{words}.*Put back what has changed since"):
        train_run(config(run, documents))
    assert train_run(config(run, documents, accept=["data"])) == 0
    assert words in " ".join(capfd.readouterr().err.split())
    assert len(losses(run)) == 9


def test_a_stage_that_has_ended_has_no_sequences_left_to_compare() -> None:
    """Its export may still be due, for which other documents change nothing."""
    state = State(stage_name="s64", planned=[64, 4, 5], cursor=12, plan="old", stage_step=3, ended=True)
    check_plan(state, "new", accept=())
    state.plan, state.ended = "old", False
    with pytest.raises(UserError, match="stage s64 stopped after 12 of its 20 sequences"):
        check_plan(state, "new", accept=())


def test_the_documents_of_a_finished_stage_may_be_gone(tmp_path: Path, undisturbed: Path) -> None:
    run, first, second = tmp_path / "run", write_documents(tmp_path / "first"), write_documents(tmp_path / "second")
    data = {
        "sources": {"a": {"kind": "text", "path": str(first)}, "b": {"kind": "text", "path": str(second)}},
        "mixes": {"default": {"a": 1.0}, "later": {"b": 1.0}},
    }
    stages = {
        "s64": {"seq_len": 64, "theta": 10000, "steps": 5, "batch": 4},
        "s128": {"seq_len": 128, "theta": 40000, "steps": 4, "batch": 2, "mix": "later"},
    }
    changes = {"data": data, "curriculum": {"stages": stages}}
    assert train_run(config(run, first, launch={"until": "s64"}, **changes)) == 0
    shutil.rmtree(first)
    assert train_run(config(run, first, **changes)) == 0
    assert len(losses(run)) == len(losses(undisturbed))
