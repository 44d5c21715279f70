"""The facts of a run on one rank (RunContext), and the outputs it reports to (Recorder)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longctx.distributed.ranks import Ranks
from longctx.signals import StopRequest
from longctx.train import runfolder
from longctx.train.display import Display
from longctx.train.heartbeat import Progress
from longctx.train.metrics import Metrics
from longctx.train.profile import ProfileWindow

if TYPE_CHECKING:
    from longctx.config.train import TrainConfig
    from longctx.curriculum import Stage


@dataclass(frozen=True, kw_only=True)
class RunContext:
    """The facts of a run on one rank, fixed before the model is loaded.

    folder: the run's folder. stop: whether a signal asked this rank to stop.
    """

    config: TrainConfig
    folder: Path
    ranks: Ranks
    stages: Sequence[Stage]
    tokenizer: Any
    stop: StopRequest


@dataclass(frozen=True, kw_only=True)
class Recorder:
    """Where a run reports its steps.

    display: the screen. metrics: metrics.jsonl and wandb, on rank 0 only. profile: torch.profiler's traces. progress:
    the current phase, which the heartbeat publishes.
    """

    display: Display
    metrics: Metrics | None
    profile: ProfileWindow
    progress: Progress

    @classmethod
    def open(cls, context: RunContext, progress: Progress, *, last_step: int) -> Recorder:
        """Open all of it. last_step: the step of the checkpoint that the run continues from."""
        config, first = context.config, context.ranks.first
        logging, folder = config.logging, context.folder
        profile = ProfileWindow(config.profile, folder, context.ranks)
        metrics = Metrics(folder, logging, runfolder.to_dict(config), last_step=last_step) if first else None
        display = Display(logging.display, logging.every_steps, context.stages, first=first)
        return cls(display=display, metrics=metrics, profile=profile, progress=progress)

    def close(self) -> None:
        """Write an unfinished trace and end the metrics; the display is a context manager of its own."""
        self.profile.close()
        if self.metrics:
            self.metrics.close()
