"""Side runs: further trainings from the same base, for the control and the sibling.

A side run is an ordinary run in RUN/side/NAME. It has one stage of its own and the main run's other settings, and can
be killed and continued like any run.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from longctx.config.after_training import AdapterSettings, AfterTrainingConfig, SideRun
from longctx.config.train import ParallelConfig, TrainConfig
from longctx.errors import RunFailed
from longctx.signals import SAVED_AND_REQUEUE


def side_folder(folder: Path, name: str) -> Path:
    """The folder into which a side run's only stage exports its model."""
    return folder / "side" / name / "stages" / name / "model"


def side_config(config: TrainConfig, folder: Path, name: str, side: SideRun) -> TrainConfig:
    """The main run's config with the side run's stage in place of its curriculum.

    Of the parallel settings, seq_len_per_rank and cp=all stay: the others divide the main run's ranks and lengths.
    """
    cp = config.parallel.cp if isinstance(config.parallel.cp, str) else "auto"
    return replace(
        config, name=f"{config.name}-{name}", run_dir=str(folder / "side" / name),
        curriculum=replace(config.curriculum, stages={name: side.stage}, only=None, theta_file=None),
        cache=config.cache or str(folder / "data"),
        launch=replace(config.launch, until=None),
        parallel=ParallelConfig(cp=cp, seq_len_per_rank=config.parallel.seq_len_per_rank),
        after_training=AfterTrainingConfig(lora=AdapterSettings(enabled=False)),
    )  # fmt: skip


def train_side(config: TrainConfig, folder: Path, name: str, side: SideRun) -> Path:
    """Train the side run unless it is finished, and return the folder of its model.

    Raises RunFailed when the training ends with an error.
    """
    from longctx.run.training import train_run
    from longctx.train import runfolder

    run = folder / "side" / name
    model = side_folder(folder, name)
    own = side_config(config, folder, name, side)
    runfolder.prepare(own)  # refuses a changed config for a finished run too
    if not (run / "stages" / name / "finished.json").exists():
        status = train_run(own)
        if status == SAVED_AND_REQUEUE:
            raise SystemExit(status)
        if status != 0:
            raise RunFailed(f"the side run {name} stopped with status {status}; the same command continues it ({run})")
    return model
