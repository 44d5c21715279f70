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


def side_folder(folder: Path, name: str) -> Path:
    """Where a side run's only stage exports its model."""
    return folder / "side" / name / "stages" / name / "model"


def train_side(config: TrainConfig, folder: Path, name: str, side: SideRun) -> Path:
    """Train it, or find it trained; the folder of its model."""
    from longctx.train.run import train

    run = folder / "side" / name
    model = side_folder(folder, name)
    if not (run / "stages" / name / "finished.json").exists():
        curriculum = replace(config.curriculum, stages={name: side.stage}, only=None, theta_file=None)
        status = train(
            replace(
                config, name=f"{config.name}-{name}", run_dir=str(run), curriculum=curriculum,
                cache=config.cache or str(folder / "data"),
                parallel=replace(config.parallel, stages={}) if config.parallel.stages else ParallelConfig(),
                hooks=HooksConfig(lora=LoraHook(enabled=False)),
            )
        )  # fmt: skip
        if status != 0:
            raise RunFailed(f"the side run {name} stopped with status {status}; the same command continues it ({run})")
    return model
