"""The tiny run that `longctx bench faults` disturbs, and one life of it as a process group."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

from longctx.config.base import build
from longctx.config.faults import FaultsConfig
from longctx.config.train import TrainConfig
from longctx.train import runfolder

VOCAB = 512
PATIENCE = 300.0


def make_run(run: Path, documents: Path, config: FaultsConfig) -> Path:
    """The folder of a run of two stages with its config.yaml written; the documents are made once."""
    _write_documents(documents)
    half = config.steps // 2
    shape = {"layers": 2, "hidden": 32, "heads": 4, "kv_heads": 2, "ffn": 64, "vocab": VOCAB, "window": 64}
    stages = {"s64": {"seq_len": 64, "theta": 10000, "steps": half, "batch": 2 * config.nproc},
              "s128": {"seq_len": 128, "theta": 40000, "steps": half, "batch": 1}}  # fmt: skip
    values = {
        "name": run.name, "run_dir": str(run),
        "model": {"init": shape, "tokenizer": str(Path(__file__).parents[1] / "assets" / "tiny")},
        "data": {"sources": {"text": {"kind": "text", "path": str(documents)}},
                 "mixes": {"default": {"text": 1.0}}},
        "curriculum": {"scratch": True, "lr": {"peak": 3.0e-3}, "stages": stages},
        "parallel": {"stages": {"s64": 1, "s128": config.nproc}}, "logging": {"display": "none"},
        "checkpoint": {"every": 1, "minutes": 0, "keep": 2, "spare_gib": 0.0},
        "evaluate": {"heldout_sequences": 0}, "hooks": {"lora": {"enabled": False}},
        "launch": {"nproc": config.nproc, "threads": 1},
    }  # fmt: skip
    runfolder.prepare(build(TrainConfig, values, origin="longctx bench faults"))
    return run


def _write_documents(folder: Path) -> None:
    if folder.exists():
        return
    folder.mkdir(parents=True)
    rng = random.Random(1)
    words = [
        "a",
        "ring",
        "passes",
        "keys",
        "and",
        "values",
        "around",
        "until",
        "every",
        "query",
        "has",
        "met",
        "them",
    ]
    for number in range(60):
        text = " ".join(rng.choice(words) for _ in range(rng.randint(40, 200)))
        (folder / f"{number:03d}.txt").write_text(text)


class Life:
    """One start of a run, launcher and ranks in a process group of their own.

    file_limit: bytes a file may have (RLIMIT_FSIZE), which fails a checkpoint as a full disk does.
    """

    def __init__(self, run: Path, *, file_limit: int | None = None) -> None:
        self.run = run
        self.log = run / "life.log"
        self._file = open(self.log, "w+")  # noqa: SIM115

        def limit() -> None:
            if file_limit is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))

        self.process = subprocess.Popen(
            [sys.executable, "-m", "longctx.train", "--resolved", str(run / "config.yaml")],
            stdout=self._file, stderr=subprocess.STDOUT, start_new_session=True, preexec_fn=limit,
            env={name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")},
        )  # fmt: skip

    def step(self) -> int:
        """The last step that metrics.jsonl holds."""
        path = self.run / "metrics.jsonl"
        lines = (
            [line for line in path.read_text().splitlines() if line.endswith("}")] if path.exists() else []
        )
        return json.loads(lines[-1])["step"] if lines else 0

    def saved_step(self) -> int:
        pointer = self.run / "latest.json"
        if not pointer.exists():
            return 0
        return int(json.loads(pointer.read_text())["checkpoint"].rsplit("step", 1)[1])

    def wait_for(self, seconds: float) -> bool:
        """Whether the run still lives after so long."""
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return True
        return False

    def wait_for_step(self, step: int) -> bool:
        """Whether it lives to do this step."""
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end and self.wait_for(0.02):
            if self.step() >= step:
                return True
        return False

    def kill(self, kind: str, rng: random.Random) -> float:
        """SIGKILL to everything, one rank, or the launcher; returns the seconds until nothing of it is
        left.
        """
        began = time.monotonic()
        ranks = children(self.process.pid)
        if kind == "rank" and ranks:
            os.kill(rng.choice(ranks), signal.SIGKILL)
        elif kind == "launcher":
            self.process.kill()
        else:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(PATIENCE)
        while any(alive(pid) for pid in ranks):
            time.sleep(0.02)
            if time.monotonic() - began > PATIENCE:
                break
        return time.monotonic() - began

    def terminate(self) -> tuple[int, str]:
        self.process.terminate()
        return self.wait()

    def wait(self) -> tuple[int, str]:
        """(status, everything it said)."""
        status = self.process.wait(PATIENCE)
        self._file.seek(0)
        return status, self._file.read()


def children(pid: int) -> list[int]:
    """Pids of a process's children, whichever of its threads started them."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*"):
        try:
            found += [int(text) for text in (task / "children").read_text().split()]
        except OSError:
            continue
    return found


def alive(pid: int) -> bool:
    """Whether a process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False
