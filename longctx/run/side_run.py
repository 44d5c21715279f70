"""Side runs: other trainings from the same base, as the controls and the sibling need them.

A side run is an ordinary run in RUN/side/NAME with one stage of its own, everything else as in the main run, so
that it can be killed and continued like any other.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from longctx.config.hooks import HooksConfig, LoraHook, SideRun
from longctx.config.train import ParallelConfig, TrainConfig
from longctx.errors import RunFailed
from longctx.signals import SAVED_AND_REQUEUE


def side_folder(folder: Path, name: str) -> Path:
    """Where a side run's only stage exports its model."""
    return folder / "side" / name / "stages" / name / "model"


def side_config(config: TrainConfig, folder: Path, name: str, side: SideRun) -> TrainConfig:
    """The main run's config with the side run's stage. Of its parallel settings only what a rank holds stays: the
    others divide the main run's ranks and lengths, and a side run has its own.
    """
    return replace(
        config, name=f"{config.name}-{name}", run_dir=str(folder / "side" / name),
        curriculum=replace(config.curriculum, stages={name: side.stage}, only=None, theta_file=None),
        cache=config.cache or str(folder / "data"),
        parallel=ParallelConfig(tokens_per_rank=config.parallel.tokens_per_rank),
        hooks=HooksConfig(lora=LoraHook(enabled=False)),
    )  # fmt: skip


def train_side(config: TrainConfig, folder: Path, name: str, side: SideRun) -> Path:
    """Train it, or find it trained; the folder of its model."""
    from longctx.train import runfolder
    from longctx.train.run import train

    run = folder / "side" / name
    model = side_folder(folder, name)
    own = side_config(config, folder, name, side)
    runfolder.prepare(own)  # a finished run too is refused where the config has changed under it
    if not (run / "stages" / name / "finished.json").exists():
        status = train(own)
        if status == SAVED_AND_REQUEUE:
            raise SystemExit(status)
        if status != 0:
            raise RunFailed(f"the side run {name} stopped with status {status}; the same command continues it ({run})")
    return model
