"""What may differ when a run is continued."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from longctx.errors import UserError
from longctx.train import runfolder

from .made import config


def test_resolved_config_reads_back_equal(tmp_path: Path) -> None:
    made = runfolder.with_dtype(config(tmp_path / "run", tmp_path / "docs"))
    runfolder.prepare(made)
    again = runfolder.read(tmp_path / "run" / "config.yaml")
    assert again == made
    assert again.model.dtype == "float32"
    assert runfolder.fingerprint(again) == runfolder.fingerprint(made)


def test_free_keys_may_change(tmp_path: Path) -> None:
    made = config(tmp_path / "run", tmp_path / "docs")
    runfolder.prepare(made)
    moved = replace(made, launch=replace(made.launch, nproc=4), parallel=replace(made.parallel, cp=2))
    moved = replace(moved, model=replace(made.model, memory=replace(made.model.memory, ffn_block=64)))
    runfolder.prepare(moved)
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["launch"]["nproc"] == 4


def test_identity_change_is_refused_and_named(tmp_path: Path) -> None:
    runfolder.prepare(config(tmp_path / "run", tmp_path / "docs"))
    other = config(tmp_path / "run", tmp_path / "docs", seed=6, optim={"clip": 0.5})
    with pytest.raises(UserError) as raised:
        runfolder.prepare(other)
    assert "seed was 5, now 6" in str(raised.value)
    assert "optim.clip was 1.0, now 0.5" in str(raised.value)
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["seed"] == 5


def test_a_meant_change_is_accepted(tmp_path: Path) -> None:
    runfolder.prepare(config(tmp_path / "run", tmp_path / "docs"))
    longer = {"stages": {"s64": {"seq_len": 64, "theta": 10000, "steps": 9, "batch": 4}}}
    meant = config(tmp_path / "run", tmp_path / "docs", curriculum=longer, accept=["curriculum.stages"])
    runfolder.prepare(meant)
    with pytest.raises(UserError, match=r"curriculum\.stages\.s64\.steps"):
        runfolder.prepare(config(tmp_path / "run", tmp_path / "docs"))
