"""Side runs: further trainings from the same base, for the control and the sibling.

A side run is an ordinary run in RUN/side/NAME. It has one stage of its own and the main run's other settings, and can
be killed and continued like any run.
"""

from __future__ import annotations

from pathlib import Path

from longctx.config.after_training import SideRun
from longctx.config.train import TrainConfig
from longctx.errors import RunFailed
from longctx.run.side_config import side_config
from longctx.run.training import train_run
from longctx.signals import SAVED_AND_REQUEUE
from longctx.train import runfolder
from longctx.train.train import resolve_stages


def side_folder(folder: Path, name: str) -> Path:
    """The folder into which a side run's only stage exports its model."""
    return runfolder.stage_folder(folder / "side" / name, name) / "model"


def train_side(config: TrainConfig, folder: Path, name: str, side: SideRun) -> Path:
    """Train the side run unless it is finished, and return the folder of its model.

    Raises RunFailed when the training ends with an error.
    """
    from longctx.train.resume import already_trained  # torch

    run = folder / "side" / name
    model = side_folder(folder, name)
    own = side_config(config, folder, name, side)
    trained = already_trained(run, resolve_stages(own))
    runfolder.prepare(own, trained=trained)  # refuses a changed config for a finished run too
    if not trained:
        status = train_run(own)
        if status == SAVED_AND_REQUEUE:
            raise SystemExit(status)
        if status != 0:
            raise RunFailed(f"the side run {name} stopped with status {status}; the same command continues it ({run})")
    return model
