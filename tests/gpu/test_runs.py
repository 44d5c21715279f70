"""Whole runs on the card: the quickstart on one rank and on two NCCL ranks, a kill and its continuation, refusals."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.started import SHORT, longctx
from tests.train.made import config, write_documents

ROOT = Path(__file__).parents[2]
ON_CARD = ["model.dtype=bfloat16", "engine.device=cuda"]


def complete(run: Path) -> None:
    """Trained, exported, extracted, merged and evaluated."""
    summary = json.loads((run / "summary.json").read_text())
    assert set(summary["needle"]) >= {"base", "extended", "sibling", "merged"}
    assert summary["adapter"]["bytes"] > 0
    assert all(found == found for losses in summary["loss"].values() for found in losses.values()), "a loss is NaN"


def test_the_quickstart_on_one_rank(tmp_path: Path) -> None:
    done = longctx("train", "experiment=quickstart", f"run_dir={tmp_path / 'run'}", "launch.nproc=1", "logging=local",
                   *ON_CARD, *SHORT)  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    assert "Traceback" not in done.stderr
    complete(tmp_path / "run")


@pytest.mark.parametrize("engine", [[], ["engine=deepspeed", "engine.zero=2"]], ids=["ddp", "zero2"])
def test_the_quickstart_on_two_nccl_ranks_of_one_card(tmp_path: Path, engine: list[str]) -> None:
    run = tmp_path / "run"
    command = [str(ROOT / "launch" / "one_gpu.sh"), "2", sys.executable, "-m", "longctx.cli", "train"]
    words = ["experiment=quickstart", f"run_dir={run}", "logging=local", "engine.device=cuda", *ON_CARD[:1], *engine]
    done = subprocess.run([*command, *words, *SHORT], capture_output=True, text=True, timeout=250, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "Traceback" not in done.stderr
    complete(run)


def test_a_killed_run_goes_on(tmp_path: Path) -> None:
    """The same steps and nearly the same losses: flash attention's backward adds in any order on a GPU."""
    from tests.train.lives import live

    documents = write_documents(tmp_path / "documents")
    place = {"model": {"dtype": "bfloat16"}, "engine": {"device": "cuda"}}
    losses = {}
    for name, kill in (("whole", None), ("killed", 5)):
        run = config(tmp_path / name, documents, **place)
        status = live(run, 1, kill_after=kill)
        assert (status == 0) is (kill is None)
        if kill is not None:
            assert live(run, 1) == 0
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        losses[name] = [json.loads(line)["loss"] for line in lines]
    assert len(losses["whole"]) == len(losses["killed"]) == 9
    assert losses["killed"] == pytest.approx(losses["whole"], rel=2e-2)


@pytest.mark.skipif(torch.cuda.device_count() != 1, reason="needs a machine with one CUDA device")
def test_two_ranks_on_one_card_are_refused_in_one_paragraph(tmp_path: Path) -> None:
    done = longctx("train", "experiment=quickstart", f"run_dir={tmp_path / 'run'}", "launch.nproc=2", *ON_CARD, *SHORT)
    assert done.returncode == 2, done.stderr[-2000:]
    assert "launch/one_gpu.sh 2" in done.stderr
    assert "Traceback" not in done.stderr


def test_what_no_fast_kernel_serves_is_refused_in_one_paragraph(tmp_path: Path) -> None:
    words = ["train", "experiment=quickstart", f"run_dir={tmp_path / 'run'}", "launch.nproc=1", "engine.device=cuda"]
    done = longctx(*words, "model.dtype=float32", *SHORT)
    assert done.returncode == 2, done.stderr[-2000:]
    assert "no fast attention kernel serves it on a GPU" in done.stderr
    done = longctx(*words, "model.dtype=bfloat16", "model.attention_kernel=torch_cpu", *SHORT)
    assert done.returncode == 2, done.stderr[-2000:]
    assert "needs CPU tensors, got cuda" in done.stderr
    assert "Traceback" not in done.stderr
