"""An offline wandb run over kills and restarts has one id and every step once, as `wandb sync` reads its folders."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from longctx.config.train import LoggingConfig
from longctx.signals import SAVED_AND_REQUEUE
from longctx.train import metrics, runfolder

from .lives import live
from .made import config
from .wandb_server import Server, serving

pytestmark = [
    pytest.mark.slow,  # a server, real processes and wandb's own start: a minute
    pytest.mark.skipif(find_spec("wandb") is None, reason="wandb is not installed"),
]


def sync(server: Server, run: Path) -> None:
    folders = sorted((run / "wandb").glob("offline-run-*"))
    environment = {**os.environ, "WANDB_BASE_URL": server.url, "WANDB_API_KEY": "0" * 40}
    environment["WANDB_ERROR_REPORTING"] = "false"
    command = [sys.executable, "-m", "wandb", "sync", *map(str, folders)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert "ERROR" not in done.stderr, done.stderr


def test_one_run_with_each_step_once_whenever_it_is_synced(tmp_path: Path, documents: Path) -> None:
    """Killed before its first save and within a stage, stopped at the end of one, synced, continued, synced again."""
    run = tmp_path / "run"
    made = config(run, documents, logging={"display": "none", "wandb": "offline"})
    ids = set()
    with serving() as server:
        for step in (1, 3):
            assert live(made, 1, kill_after=step) == -signal.SIGKILL
            ids.add((run / runfolder.WANDB_ID).read_text())
        assert live(made, 1, stop_after=5) == SAVED_AND_REQUEUE
        sync(server, run)
        assert live(made, 1) == 0
        sync(server, run)
    ids.add((run / runfolder.WANDB_ID).read_text())
    assert server.runs == ids
    assert len(ids) == 1
    early, newest = server.uploads
    assert [row["_step"] for row in early] == [1, 2, 3, 4, 5]
    steps = metrics.read(run / "metrics.jsonl")
    for rows in (newest, server.history()):
        assert [row["_step"] for row in rows] == list(range(1, 12))
        trained = [row for row in rows if "train/loss" in row]
        assert [row["train/step"] for row in trained] == list(range(1, 10))
        assert [row["train/loss"] for row in trained] == pytest.approx([line["loss"] for line in steps])
        assert [row["_timestamp"] for row in trained] == pytest.approx([line["time"] for line in steps])
        ends = [row for row in rows if "eval/heldout_loss" in row]
        assert [row["data/tokens"] for row in ends] == [steps[4]["tokens"], steps[8]["tokens"]]


def test_an_online_run_is_resumed_and_sent_what_the_server_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five steps of which the server got three, since the process was killed; then a sixth."""
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    online = LoggingConfig(wandb="online")

    def line(step: int) -> dict[str, Any]:
        return {"step": step, "stage": "s64", "loss": 1.0 / step, "tokens": 256 * step, "time": 1e9 + step}

    def write(*steps: int) -> None:
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line(step)) + "\n" for step in steps))

    with serving() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        write(1, 2, 3)
        metrics.Metrics(tmp_path, online, {}, last_step=3).close()
        write(1, 2, 3, 4, 5)
        again = metrics.Metrics(tmp_path, online, {}, last_step=5)
        again.step(line(6))
        again.close()
    assert [row["_step"] for upload in server.uploads for row in upload] == [1, 2, 3, 4, 5, 6]
    assert len(server.runs) == 1
