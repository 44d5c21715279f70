"""`longctx train`: train all stages, then make the adapter, the merged sibling, the evidence and the report."""

from __future__ import annotations

from pathlib import Path

from longctx.config.train import TrainConfig
from longctx.curriculum.select import selected
from longctx.distributed.launcher import launcher_environment, leave_launcher
from longctx.processes import check_crowd
from longctx.run.training import settled_for_adapter, train_run
from longctx.run.what_follows import check_what_follows
from longctx.signals import all_saved
from longctx.train import runfolder


def run(config: TrainConfig) -> int:
    """Train, then do what `after_training` asks for. Returns the exit status."""
    if launcher_environment()["WORLD_SIZE"] == "1":
        check_crowd("launch.nproc", config.launch.nproc)
    all_saved(runfolder.saved_in(Path(config.folder)))
    config = settled_for_adapter(config)
    check_what_follows(config)
    if config.smoke:
        from longctx.run.smoke import smoke

        if (status := smoke(config)) is not None:
            return status
    status = train_run(config)
    if config.launch.until not in (None, list(selected(config.curriculum, "configs/curriculum"))[-1]):
        return status  # what follows training waits for the last stage
    if status == 0 and launcher_environment()["RANK"] == "0":
        from longctx.run.after_training import run_after_training

        leave_launcher()  # side runs start their own ranks
        all_saved("training is done")
        with runfolder.held(Path(config.folder)):
            status = run_after_training(config, Path(config.folder))
    return status
