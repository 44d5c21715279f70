"""The configs of side runs: further trainings from the same base, for the control and the sibling."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from longctx.config.after_training import AdapterSettings, AfterTrainingConfig, SideRun
from longctx.config.train import ParallelConfig, TrainConfig


def side_config(config: TrainConfig, folder: Path, name: str, side: SideRun) -> TrainConfig:
    """The main run's config with the side run's stage in place of its curriculum.

    A stage of at most the base's window keeps it, and without a theta of its own the base's rope; a longer one follows
    the curriculum's rule. Of the parallel settings, seq_len_per_rank and cp=all stay: the others divide the main run's
    ranks and lengths.
    """
    cp = config.parallel.cp if isinstance(config.parallel.cp, str) else "auto"
    return replace(
        config, name=f"{config.name}-{name}", run_dir=str(folder / "side" / name),
        curriculum=replace(config.curriculum, stages={name: side.stage}, only=None, theta_file=None, scratch=False,
                           keep_window=True),
        cache=config.cache or str(folder / "data"),
        launch=replace(config.launch, until=None),
        parallel=ParallelConfig(cp=cp, seq_len_per_rank=config.parallel.seq_len_per_rank),
        after_training=AfterTrainingConfig(lora=AdapterSettings(enabled=False)),
    )  # fmt: skip
