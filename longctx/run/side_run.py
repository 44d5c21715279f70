"""Side runs: further trainings from the same base, for the control and the sibling.

A side run is an ordinary run in RUN/side/NAME. It has one stage of its own and the main run's other settings, and can
be killed and continued like any run.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from longctx.config.after_training import AdapterSettings, AfterTrainingConfig, SideRun
from longctx.config.train import ParallelConfig, TrainConfig
from longctx.errors import RunFailed, UserError
from longctx.signals import SAVED_AND_REQUEUE


def side_folder(folder: Path, name: str) -> Path:
    """The folder into which a side run's only stage exports its model."""
    return folder / "side" / name / "stages" / name / "model"


def side_config(config: TrainConfig, folder: Path, name: str, side: SideRun) -> TrainConfig:
    """The main run's config with the side run's stage in place of its curriculum.

    The stage extends nothing: without a theta of its own it keeps the base's rope, and a short one keeps its window. Of
    the parallel settings, seq_len_per_rank and cp=all stay: the others divide the main run's ranks and lengths.
    """
    cp = config.parallel.cp if isinstance(config.parallel.cp, str) else "auto"
    return replace(
        config, name=f"{config.name}-{name}", run_dir=str(folder / "side" / name),
        curriculum=replace(config.curriculum, stages={name: side.stage}, rule=None, only=None, theta_file=None,
                           scratch=False, keep_window=True),
        cache=config.cache or str(folder / "data"),
        launch=replace(config.launch, until=None),
        parallel=ParallelConfig(cp=cp, seq_len_per_rank=config.parallel.seq_len_per_rank),
        after_training=AfterTrainingConfig(lora=AdapterSettings(enabled=False)),
    )  # fmt: skip


def check_side_runs(config: TrainConfig) -> None:
    """Raise UserError for a side run whose stage cannot be trained; called before the main run, which may take days."""
    from longctx.decide import Machines, decide_all
    from longctx.shape import shape_of_model
    from longctx.train.run import resolve_stages

    asked = config.after_training
    sides = {
        "sibling": ("sibling.run", asked.sibling.run if asked.sibling else None),
        "control": ("evidence.control", asked.evidence.control if asked.evidence else None),
    }
    for name, (key, side) in sides.items():
        if side is None:
            continue
        own = side_config(config, Path(config.folder), name, side)
        shape, nproc = shape_of_model(own.model), own.launch.nproc
        try:
            stages = resolve_stages(own)
            heads = (shape.heads, shape.kv_heads)
            decide_all(stages, own.parallel, own.engine, Machines(nproc, nproc), heads, own.model.dtype)
        except UserError as error:
            said = str(error).replace(f"curriculum.stages.{name}", f"after_training.{key}.stage")
            raise UserError(said.replace("(configs/curriculum)", "(configs/after_training)")) from None


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
