"""metrics.jsonl records a run with one line per step; wandb, where wanted, mirrors it.

Rank 0 writes both. A continued run removes the lines after its checkpoint, so that the file has each step once and a
killed run leaves the same file as an undisturbed one.

The wandb run belongs to the run's folder: its id is written there before the first step. A process that continues the
run first sends wandb the rows that it lacks. Offline these are all rows, because every process writes a folder of its
own and a killed one leaves it empty. The newest folder then holds the whole run, and at the run's end the older ones
are marked so that `wandb sync` skips them. Rows keep their numbers, so that no row is synced twice. wandb's keys begin
with train/, speed/, memory/, rope/, data/ and eval/, and tokens are the x axis.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from itertools import groupby
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import torch

from longctx import console
from longctx.host_memory import peak_resident
from longctx.storage.files import write_text
from longctx.train.runfolder import WANDB_ID, ended_stage, stage_folder

if TYPE_CHECKING:
    from longctx.config.train import LoggingConfig

# metrics.jsonl's name -> wandb's.
WANDB_KEYS = {
    "step": "train/step",
    "loss": "train/loss", "z_loss": "train/z_loss", "grad_norm": "train/grad_norm", "lr": "train/lr",
    "skipped": "train/skipped",
    "stage_index": "train/stage", "stage_step": "train/stage_step",
    "tokens_per_second": "speed/tokens_per_second",
    "tokens_per_second_per_rank": "speed/tokens_per_second_per_rank",
    "mfu": "speed/mfu", "hfu": "speed/hfu", "model_tflops": "speed/model_tflops_per_rank",
    "memory_gib": "memory/high_water_gib",
    "theta": "rope/theta", "seq_len": "rope/seq_len",
    "tokens": "data/tokens", "weight": "data/loss_weight", "cursor": "data/cursor",
    "heldout_loss": "eval/heldout_loss",
}  # fmt: skip


class Metrics:
    """The metrics of a run, on rank 0.

    last_step: the step of the checkpoint that the run continues from.

    A row's number in wandb is its step plus the number of stages that ended before it, so that the held-out loss at a
    stage's end has a number of its own.
    """

    def __init__(self, run: Path, config: LoggingConfig, resolved: Mapping[str, Any], *, last_step: int) -> None:
        self.path = run / "metrics.jsonl"
        self._keep_until(last_step)
        self._file: IO[str] | None = open(self.path, "a", encoding="utf-8")  # noqa: SIM115
        self._ended = 0
        self._wandb = _start_wandb(run, config, resolved) if config.wandb != "disabled" else None
        if self._wandb:
            self._known = self._wandb.starting_step  # online, rows below this number are on the server
            self._replay(run)

    def step(self, line: Mapping[str, Any]) -> None:
        self._write(json.dumps(line))
        self._mirror(line)

    def stage_ended(self, step: int, tokens: int, heldout_loss: float | None) -> None:
        """Send the held-out loss at a stage's end to wandb; in the run's folder, finished.json has it."""
        self._ended += 1
        if heldout_loss is not None:
            self._mirror({"step": step, "tokens": tokens, "heldout_loss": heldout_loss})

    def close(self) -> None:
        if self._file:
            self._file.close()
        if self._wandb:
            self._wandb.finish()
            own = Path(self._wandb.dir).parent
            for older in own.parent.glob(f"offline-run-*-{self._wandb.id}"):
                if older.name < own.name:
                    (older / f"run-{self._wandb.id}.wandb.synced").touch()

    def _mirror(self, line: Mapping[str, Any]) -> None:
        number = line["step"] + self._ended
        if self._wandb and number >= self._known:
            self._wandb.log(wandb_line(line), step=number, commit=True)

    def _replay(self, run: Path) -> None:
        """Send wandb the rows of earlier processes. The loop reports the end of the last stage."""
        last: dict[str, Any] = {}
        for _, lines in groupby(read(self.path), key=lambda line: line["stage"]):
            if last:
                mark = stage_folder(run, last["stage"]) / "finished.json"
                ended = ended_stage(mark, "wandb does not get its held-out loss") or {}
                self.stage_ended(last["step"], last["tokens"], ended.get("heldout_loss"))
            for line in lines:
                self._mirror(line)
                last = line

    def _write(self, text: str) -> None:
        if not self._file:
            return
        try:
            self._file.write(text + "\n")
            self._file.flush()
        except OSError as error:  # a full disk must not end a run
            console.warn(f"{self.path} cannot be written ({error.strerror}); no more metrics until the next start")
            self._file = None

    def _keep_until(self, step: int) -> None:
        """Remove the lines of steps that will be done again, and a line that a kill left half-written."""
        if not self.path.exists():
            return
        lines = self.path.read_text(errors="replace", encoding="utf-8").splitlines(keepends=True)
        kept = [line for line in lines if _step_of(line) <= step]
        if len(kept) != len(lines):
            write_text(self.path, "".join(kept))


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"] if line.endswith("\n") else float("inf")
    except (ValueError, KeyError):
        return float("inf")


def read(path: Path) -> list[dict[str, Any]]:
    """All lines of a metrics.jsonl."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def wandb_line(line: Mapping[str, Any]) -> dict[str, Any]:
    """A line under wandb's keys; the seconds of a step's phases become speed/seconds_*."""
    out = {WANDB_KEYS[key]: value for key, value in line.items() if key in WANDB_KEYS and value is not None}
    out |= {f"speed/seconds_{phase}": value for phase, value in line.get("seconds", {}).items()}
    out |= {f"data/{key}": value for key, value in line.get("data", {}).items()}
    if "time" in line:
        out["_timestamp"] = line["time"]  # a replayed row keeps the time of its step
    if line.get("loss") is not None:
        out[f"train/loss_by_stage/{line['stage']}"] = line["loss"]
    return out


def _start_wandb(run: Path, config: LoggingConfig, resolved: Mapping[str, Any]) -> Any:
    import wandb

    stored = run / WANDB_ID
    if not stored.exists():
        write_text(stored, uuid.uuid4().hex[:8])
    started = wandb.init(
        project=config.project, name=run.name, dir=str(run), mode=config.wandb, id=stored.read_text(encoding="utf-8"),
        resume="allow" if config.wandb == "online" else None, config=dict(resolved),
        settings=wandb.Settings(console="off", silent=True),
    )  # fmt: skip
    started.define_metric("data/tokens")
    started.define_metric("*", step_metric="data/tokens")
    return started


def memory_gib(device: torch.device) -> float:
    """The most GiB that this rank has held: of the device's allocator, or of the resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return peak_resident() / 2**30
