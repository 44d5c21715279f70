"""Whole runs on the card: the quickstart on one rank and on two NCCL ranks, a kill and its continuation, refusals."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from longctx.config.train import TrainConfig
from longctx.run.training import settled_for_adapter
from longctx.train import runfolder
from tests.gpu.card import DTYPE_NAME, KIND, ON_CARD, needs_cuda
from tests.started import SHORT
from tests.train.made import config, write_documents

ROOT = Path(__file__).parents[2]


def longctx(*words: str, timeout: float = 280) -> subprocess.CompletedProcess[str]:
    """A started interpreter: one that is forked from a process which has looked for a GPU cannot use it."""
    command = [sys.executable, "-m", "longctx", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, cwd=ROOT)


def complete(run: Path) -> None:
    """Assert that the run trained, exported, extracted, merged and evaluated."""
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
    command = [str(ROOT / "launch" / "one_gpu.sh"), "2", sys.executable, "-m", "longctx", "train"]
    words = ["experiment=quickstart", f"run_dir={run}", "logging=local", *ON_CARD, *engine]
    done = subprocess.run([*command, *words, *SHORT], capture_output=True, text=True, timeout=250, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "Traceback" not in done.stderr
    complete(run)


def life(run: TrainConfig, kill_after: int = 0) -> int:
    """Train in a process of its own, killed (SIGKILL) once it has logged step `kill_after`; returns its status."""
    file = runfolder.prepare(settled_for_adapter(run)) / "config.yaml"
    body = "import sys; from tests.train.lives import one; sys.exit(one(sys.argv[1], 0, None, int(sys.argv[2]), None))"
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "localhost"}
    words = [sys.executable, "-c", body, str(file), str(kill_after)]
    return subprocess.run(words, cwd=ROOT, env={**os.environ, **rank, "MASTER_PORT": port}, timeout=200).returncode


@pytest.mark.parametrize("engine", [{}, {"name": "deepspeed", "zero": 3}], ids=["ddp", "zero3"])
def test_a_killed_run_goes_on(tmp_path: Path, engine: dict[str, Any]) -> None:
    """The same steps and nearly the same losses: flash attention's backward adds in any order on a GPU."""
    documents = write_documents(tmp_path / "documents")
    place = {"model": {"dtype": DTYPE_NAME}, "engine": {**engine, "device": KIND}}
    losses = {}
    for name, kill in (("whole", 0), ("killed", 5)):
        run = config(tmp_path / name, documents, **place)
        assert (life(run, kill) == 0) is (kill == 0)
        assert kill == 0 or life(run) == 0
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        losses[name] = [json.loads(line)["loss"] for line in lines]
    assert len(losses["whole"]) == len(losses["killed"]) == 9
    assert losses["killed"] == pytest.approx(losses["whole"], rel=2e-2)


@pytest.mark.skipif(torch.cuda.device_count() != 1, reason="needs a machine with one CUDA device")
def test_two_ranks_on_one_card_are_refused_in_one_paragraph(tmp_path: Path) -> None:
    done = longctx("train", "experiment=quickstart", f"run_dir={tmp_path / 'run'}", "launch.nproc=2", "logging=local",
                   *ON_CARD, *SHORT)  # fmt: skip
    assert done.returncode == 2, done.stderr[-2000:]
    assert "launch/one_gpu.sh 2" in done.stderr
    assert "Traceback" not in done.stderr


@needs_cuda
def test_what_no_fast_kernel_serves_is_refused_in_one_paragraph(tmp_path: Path) -> None:
    words = ["train", "experiment=quickstart", f"run_dir={tmp_path / 'run'}", "launch.nproc=1", "logging=local",
             "engine.device=cuda"]  # fmt: skip
    done = longctx(*words, "model.dtype=float32", *SHORT)
    assert done.returncode == 2, done.stderr[-2000:]
    assert "no fast attention kernel serves it on a GPU" in done.stderr
    done = longctx(*words, "model.dtype=bfloat16", "model.attention_kernel=torch_cpu", *SHORT)
    assert done.returncode == 2, done.stderr[-2000:]
    assert "needs CPU tensors, got cuda" in done.stderr
    assert "Traceback" not in done.stderr
