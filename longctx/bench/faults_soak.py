"""The state of a soak test, and what a run must leave whatever has happened to it."""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from longctx.bench.faults_run import LAST_STAGE, StartedRun, make_run
from longctx.config.faults import FaultsConfig
from longctx.errors import RunFailed
from longctx.train.runfolder import stage_folder

KINDS = ("everything", "rank")
SLOWEST_END = 30.0  # seconds within which a run must end after a rank has died
# The keys of metrics.jsonl that no clock and no memory counter stands behind.
EXACT = (
    "step", "stage", "stage_step", "loss", "z_loss", "tail_loss", "grad_norm", "lr", "skipped", "tokens", "step_tokens",
    "weight", "cursor", "theta", "seq_len", "cp", "dp", "data",
)  # fmt: skip


@dataclass
class Soak:
    """The state of a soak test: the current run, and the kills and runs so far.

    wanted: the results of the undisturbed run. large: the runs are those whose saves last for several steps.
    """

    config: FaultsConfig
    folder: Path
    rng: random.Random
    large: bool = False
    wanted: dict[str, Any] = field(default_factory=dict)
    kills: Counter[str] = field(default_factory=Counter)
    sigterms: int = 0
    runs: int = 0
    slowest_end: float = 0.0
    most_lost: int = 0
    path: Path = field(default_factory=Path)

    def begin(self, name: str | None = None) -> None:
        """Make the folder of another run."""
        self.runs += 1
        path = self.folder / (name or f"{'large' if self.large else 'run'}{self.runs:03d}")
        self.path = make_run(path, self.folder / "documents", self.config, large=self.large)

    def start(self, *, file_limit: int | None = None) -> StartedRun:
        """Start the current run, for the first time or to continue it."""
        return StartedRun(self.path, self.config.nproc, file_limit=file_limit)

    def keep_results(self, started: StartedRun) -> None:
        """Wait for the end of the undisturbed run, and keep its results as those of every other."""
        status, text = started.wait()
        if status != 0:
            raise RunFailed(f"the undisturbed run failed with status {status}: {text[-2000:]}")
        self.wanted = results_of(self.path)

    def kill(self, started: StartedRun, kind: str) -> None:
        """Kill all ranks or one; raises RunFailed where those that are left do not end soon."""
        seconds = started.kill(kind, self.rng)
        if seconds > SLOWEST_END:
            raise RunFailed(f"{seconds:.0f} s after the kill of one {kind} the run was still there")
        if kind == "rank":
            self.slowest_end = max(self.slowest_end, seconds)

    def finish(self, started: StartedRun, *, checkpoint: bool = True) -> str:
        """Wait for the run's end, check its results (see `ended`), and return what its ranks have written."""
        status, text = started.wait()
        if status != 0:
            raise RunFailed(f"{self.path} did not come to its end: status {status}: {text[-2000:]}")
        self.ended(checkpoint=checkpoint)
        return text

    def ended(self, *, checkpoint: bool = True) -> None:
        """Check a finished run: its results must equal those of the undisturbed run, and no half-written file is left.

        checkpoint: the last checkpoint is compared too.
        """
        found = results_of(self.path)
        wrong = [name for name in found if found[name] != self.wanted[name] and (checkpoint or name != "checkpoint")]
        if wrong:
            raise RunFailed(
                f"{self.path} ended with other {' and '.join(wrong)} than the undisturbed run after "
                f"{self.kills.total()} kills"
            )
        if left := [str(path) for path in self.path.rglob(".*.partial-*")]:
            raise RunFailed(f"{self.path} ended and half-written files are left: {', '.join(left)}")


def results_of(run: Path) -> dict[str, Any]:
    """Return what must not depend on interruptions: weights, checkpoint (weights, moments, random state) and metrics.

    Files are given by their SHA-256. Raises RunFailed where the run has exported nothing.
    """
    files = sorted((stage_folder(run, LAST_STAGE) / "model").glob("*.safetensors"))
    if not files:
        raise RunFailed(f"{run} has exported nothing")
    last = run / json.loads((run / "latest.json").read_text(encoding="utf-8"))["checkpoint"]
    manifest = json.loads((last / "manifest.json").read_text(encoding="utf-8"))
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return {
        "weights": [hashlib.sha256(file.read_bytes()).hexdigest() for file in files],
        "checkpoint": {name: entry["sha256"] for name, entry in manifest["files"].items()},
        "metrics": [{key: row[key] for key in EXACT} for row in rows],
    }
