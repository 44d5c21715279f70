"""The tiny run of `longctx bench faults`, and the processes of its ranks.

A tiny run spends most of its time importing torch and transformers. So the ranks are forked from a server that has
already imported them; they are separate processes and are killed like any others.
"""

from __future__ import annotations

import json
import multiprocessing
import multiprocessing.connection
import os
import random
import resource
import signal
import socket
import sys
import time
from abc import ABC, abstractmethod
from pathlib import Path

from longctx.config.base import build
from longctx.config.faults import FaultsConfig
from longctx.config.train import TrainConfig
from longctx.processes import handles
from longctx.train import runfolder

VOCAB = 512
LAST_STAGE = "s128"
SAVE_EVERY = 4  # steps between two saves of a large run
PATIENCE = 300.0
CONTEXT = multiprocessing.get_context("forkserver")
PRELOAD = [
    "torch",
    "torch.distributed",
    "transformers.models.llama.modeling_llama",
    "transformers.models.auto.modeling_auto",
    "longctx.run.training",
    "longctx.train.loop",
    "longctx.train.replicated",
    "longctx.model.export",
    "longctx.attention",
    "longctx.data.stage_opening",
]
CONTEXT.set_forkserver_preload(PRELOAD)


def make_run(run: Path, documents: Path, config: FaultsConfig, *, large: bool = False) -> Path:
    """Make the folder of a run of two stages with its config.yaml; the documents are written if they are missing.

    It saves after every step. large: it saves in the background, every SAVE_EVERY steps, a model of 4 million
    parameters (48 MB with the moments), which takes a few steps.
    """
    _write_documents(documents)
    half = config.steps // 2
    shape = {"layers": 2, "hidden": 32, "heads": 4, "kv_heads": 2, "ffn": 64, "vocab": VOCAB, "window": 64}
    checkpoint = {"every_steps": 1, "every_minutes": 0, "keep": 2, "spare_gib": 0.0}
    batch, heldout = 2 * config.nproc, 64
    if large:
        shape |= {"hidden": 512, "ffn": 768}
        checkpoint |= {"every_steps": SAVE_EVERY, "background": True}
        batch, heldout = config.nproc, 0
    stages = {"s64": {"seq_len": 64, "theta": 10000, "steps": half, "batch": batch},
              LAST_STAGE: {"seq_len": 128, "theta": 40000, "steps": half, "batch": 1}}  # fmt: skip
    values = {
        "name": run.name, "run_dir": str(run),
        "model": {"init": shape, "tokenizer": str(Path(__file__).parents[1] / "assets" / "tiny")},
        "data": {"sources": {"text": {"kind": "text", "path": str(documents)}},
                 "mixes": {"default": {"text": 1.0}}},
        "curriculum": {"scratch": True, "lr": {"peak": 3.0e-3}, "stages": stages},
        "parallel": {"cp_by_stage": {"s64": 1, LAST_STAGE: config.nproc}}, "logging": {"display": "none"},
        "checkpoint": checkpoint, "evaluate": {"heldout_sequences": heldout},
        "after_training": {"lora": {"enabled": False}}, "launch": {"nproc": config.nproc, "threads": 1},
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
        (folder / f"{number:03d}.txt").write_text(text, encoding="utf-8")


class RunWatcher(ABC):
    """Reads the progress of a run from its files while it runs."""

    def __init__(self, run: Path) -> None:
        self.run = run

    def step(self) -> int:
        """Return the last step in metrics.jsonl."""
        path = self.run / "metrics.jsonl"
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        lines = [line for line in text.splitlines() if line.endswith("}")]
        return json.loads(lines[-1])["step"] if lines else 0

    def saved_step(self) -> int:
        pointer = self.run / "latest.json"
        if not pointer.exists():
            return 0
        return int(json.loads(pointer.read_text(encoding="utf-8"))["checkpoint"].rsplit("step", 1)[1])

    @abstractmethod
    def wait_for(self, seconds: float) -> bool:
        """Wait `seconds` or until a rank ends; returns whether all ranks are alive."""

    def wait_for_step(self, step: int) -> bool:
        """Wait for this step; returns whether the run reached it."""
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end and self.wait_for(0.01):
            if self.step() >= step:
                return True
        return False


class StartedRun(RunWatcher):
    """The processes of a run that was started once, forked from a server that has imported torch.

    file_limit: the largest size of a file in bytes (RLIMIT_FSIZE), which makes a checkpoint fail as a full disk does.
    """

    def __init__(self, run: Path, ranks: int, *, file_limit: int | None = None) -> None:
        super().__init__(run)
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        self.log = run / "life.log"
        self.log.write_text("", encoding="utf-8")
        self.ranks = [
            CONTEXT.Process(target=_rank, args=(run, rank, ranks, port, file_limit), daemon=True)
            for rank in range(ranks)
        ]
        for process in self.ranks:
            process.start()

    def wait_for(self, seconds: float) -> bool:
        multiprocessing.connection.wait([process.sentinel for process in self.ranks], seconds)
        return all(process.is_alive() for process in self.ranks)

    def kill(self, kind: str, rng: random.Random) -> float:
        """Send SIGKILL to all ranks or to a random one; returns the seconds until all ranks have ended."""
        began = time.monotonic()
        for process in self.ranks if kind == "everything" else [rng.choice(self.ranks)]:
            process.kill()
        for process in self.ranks:
            process.join(PATIENCE)
        return time.monotonic() - began

    def terminate(self) -> tuple[int, str]:
        for process in self.ranks:
            while process.is_alive() and not handles(process.pid or 0, signal.SIGTERM):
                time.sleep(0.01)  # as the launcher does, see longctx.distributed.local
            process.terminate()
        return self.wait()

    def wait(self) -> tuple[int, str]:
        """Wait for the end; returns the first exit status other than 0 (or 0) and the output of all ranks."""
        for process in self.ranks:
            process.join(PATIENCE)
        statuses = [process.exitcode for process in self.ranks]
        return next((status for status in statuses if status != 0), 0) or 0, self.log.read_text(encoding="utf-8")


def _rank(run: Path, rank: int, world: int, port: int, file_limit: int | None) -> None:
    """Run one forked rank: set torchrun's environment, redirect the output to the log, and train."""
    if file_limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    log = os.open(run / "life.log", os.O_WRONLY | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world))
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port))
    from longctx.run.rank import main

    sys.exit(main(str(run / "config.yaml")))
