"""The training of a run: on ranks started here, or in this process, which may be a rank that a launcher started.

`longctx.train` receives from here what the later parts of a run need of it: which parameters the adapter will not
carry, and what to make at the end of each stage.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from longctx import collector
from longctx.config.train import TrainConfig
from longctx.decide import with_blocks
from longctx.distributed.launcher import launcher_environment
from longctx.processes import warn_if_crowded
from longctx.run.adapter import extract_adapter, left_out
from longctx.run.what_follows import check_evidence_fits, prepare_what_follows
from longctx.train import checks, runfolder
from longctx.train.train import checked_stages, prepare_data, settled, train

if TYPE_CHECKING:
    from longctx.curriculum import Stage


def settled_for_adapter(config: TrainConfig) -> TrainConfig:
    """The config with model.dtype=auto and optim.freeze=auto decided; a run that is continued keeps its own."""
    return settled(config, not_carried=partial(left_out, config))


def train_run(config: TrainConfig, *, checked: bool = False) -> int:
    """Train all stages. Returns 0, or the status of what ended the run.

    One process with launch.nproc > 1 and no launcher around it starts the ranks. checked: the process that started
    this rank has checked everything and tokenized the documents.
    """
    config = settled_for_adapter(config)
    if int(launcher_environment()["WORLD_SIZE"]) == 1 and config.launch.nproc > 1:
        return _start_ranks(config)
    return train(
        config, not_carried=partial(left_out, config), after_stage=after_stage(config),
        check_more=partial(check_evidence_fits, config), prepare_more=partial(prepare_what_follows, config),
        checked=checked,
    )  # fmt: skip


def _start_ranks(config: TrainConfig) -> int:
    """Check everything, write config.yaml, tokenize the documents, and only then start launch.nproc ranks."""
    nproc = config.launch.nproc
    more = partial(check_evidence_fits, config)
    stages = checked_stages(config, world=nproc, local_world=nproc, check_more=more)
    from longctx.train.machine import device_type  # torch, after the checks
    from longctx.train.resume import already_trained

    config = replace(config, model=with_blocks(config.model, device_type(config.engine)))
    with runfolder.held(Path(config.folder)):
        trained = already_trained(Path(config.folder), stages)
        folder = runfolder.prepare(config, trained=trained)
    tokenizer = checks.load_checked_tokenizer(config)
    collector.end_imports()
    prepare_data(config, stages, tokenizer)
    prepare_what_follows(config, tokenizer)
    from longctx.run.launch import run_ranks_and_explain

    warn_if_crowded("launch.nproc", nproc)
    resolved = str(folder / "config.yaml")
    return run_ranks_and_explain(
        config.launch, nproc, folder, checks.cache_folder(config), "longctx.run.rank", resolved
    )


def after_stage(config: TrainConfig) -> Callable[[Stage, Path, Path], None] | None:
    """The function that makes a stage's adapter unless it is up to date, or None where the config asks for none.

    It takes the stage, the folder of its exported model and the folder for its results.
    """
    if not (config.after_training.lora.enabled and config.after_training.lora.per_stage and config.model.path):
        return None

    def adapter(stage: Stage, model: Path, out: Path) -> None:
        extract_adapter(config, model, out.parent / "adapter")

    return adapter
