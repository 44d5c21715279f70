"""metrics.jsonl, one line per step: the truth. wandb, when wanted, mirrors it.

Written by rank 0 only. A run that is continued cuts the lines after its checkpoint, so that each step stands
there once and a killed run leaves the same file as an undisturbed one. wandb's keys stand under train/,
speed/, memory/, rope/, data/ and eval/ with tokens as the x axis, and the run goes on under its own id.
"""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import torch

from longctx import console
from longctx.durable import write_text

if TYPE_CHECKING:
    from longctx.config.train import LoggingConfig

# metrics.jsonl's name -> wandb's.
WANDB_KEYS = {
    "loss": "train/loss", "grad_norm": "train/grad_norm", "lr": "train/lr", "skipped": "train/skipped",
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
    """Use on rank 0; `step` writes one line and hands it to wandb."""

    def __init__(
        self,
        run: Path,
        config: LoggingConfig,
        resolved: Mapping[str, Any],
        *,
        last_step: int,
        wandb_id: str | None,
    ):
        self.path = run / "metrics.jsonl"
        self._keep_until(last_step)
        self._file: IO[str] | None = open(self.path, "a")  # noqa: SIM115
        self._wandb = _start_wandb(run, config, resolved, wandb_id) if config.wandb != "disabled" else None
        self.wandb_id: str | None = self._wandb.id if self._wandb else wandb_id

    def step(self, line: Mapping[str, Any]) -> None:
        self._write(json.dumps(line))
        if self._wandb:
            self._wandb.log(wandb_line(line))

    def evaluation(self, line: Mapping[str, Any]) -> None:
        """A result between stages: to wandb only, its own files hold it otherwise."""
        if self._wandb:
            self._wandb.log(wandb_line(line))

    def close(self) -> None:
        if self._file:
            self._file.close()
        if self._wandb:
            self._wandb.finish()

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
        """Cut lines of steps that will be done again, and a line that a kill left half-written."""
        if not self.path.exists():
            return
        lines = self.path.read_text(errors="replace").splitlines(keepends=True)
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
    return [json.loads(line) for line in path.read_text().splitlines()]


def wandb_line(line: Mapping[str, Any]) -> dict[str, Any]:
    """A line under wandb's keys; the split of a step's time becomes speed/seconds_*."""
    out = {WANDB_KEYS[key]: value for key, value in line.items() if key in WANDB_KEYS and value is not None}
    out |= {f"speed/seconds_{phase}": value for phase, value in line.get("seconds", {}).items()}
    out |= {f"data/{key}": value for key, value in line.get("data", {}).items()}
    if "loss" in line:
        out[f"train/loss_by_stage/{line['stage']}"] = line["loss"]
    return out


def _start_wandb(run: Path, config: LoggingConfig, resolved: Mapping[str, Any], wandb_id: str | None) -> Any:
    import wandb

    started = wandb.init(
        project=config.project, name=run.name, dir=str(run), mode=config.wandb, id=wandb_id,
        resume="allow" if wandb_id and config.wandb == "online" else None, config=dict(resolved),
        settings=wandb.Settings(console="off", silent=True),
    )  # fmt: skip
    started.define_metric("data/tokens")
    started.define_metric("*", step_metric="data/tokens")
    return started


def memory_gib(device: torch.device) -> float:
    """High-water mark of this rank: the device's allocator, or the process's resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
