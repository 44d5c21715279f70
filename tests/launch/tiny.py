"""The smallest complete run: the embedded model, one stage of 64 tokens, a checkpoint every two steps."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path

from longctx.train import metrics
from tests.train.made import write_documents


@cache
def _documents() -> tempfile.TemporaryDirectory:
    folder = tempfile.TemporaryDirectory(prefix="longctx-launch-")
    write_documents(Path(folder.name))
    return folder


def words(*, steps: int = 30, adapter: bool = False, run_dir: Path | None = None) -> list[str]:
    """The command line of a tiny run whose ranks share every sequence; adapter: of one that leaves an adapter too."""
    length = 1024 if adapter else 64  # an adapter is for a longer window than the base's 512 tokens
    given = [
        "model=tiny", "data=text", f"data.path={_documents().name}", "parallel=ring", "curriculum.scratch=true",
        "~curriculum.stages.s2048", "~curriculum.stages.s8192",
        f"+curriculum.stages.s{length}={{seq_len: {length}, theta: 20000, steps: {steps}, batch: 4}}",
        "checkpoint.every_steps=2", "checkpoint.every_minutes=0", "checkpoint.spare_gib=0",
        "evaluate.heldout_sequences=0",
        f"after_training.lora.enabled={str(adapter).lower()}",
    ]  # fmt: skip
    return given if run_dir is None else [*given, f"run_dir={run_dir}"]


def steps_of(run: Path) -> int:
    """The steps in the run's metrics."""
    path = run / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def trains(run: Path) -> bool:
    """Whether the run has a checkpoint and has taken a step after it."""
    return (run / "latest.json").exists() and steps_of(run) >= 4


def same_model(one: Path, other: Path) -> bool:
    """Whether two runs ended with the same weights, bit for bit, and the same losses."""
    file = "stages/s64/model/model.safetensors"
    losses = [[line["loss"] for line in metrics.read(run / "metrics.jsonl")] for run in (one, other)]
    return losses[0] == losses[1] and (one / file).read_bytes() == (other / file).read_bytes()
