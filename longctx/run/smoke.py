"""`smoke=true`: two steps of every stage's length before the run, so that what fails at the longest fails in minutes.

It has the run's model, engine, ranks, cp, micro-batch and documents, and as few sequences a step as these allow. The
weights are thrown away.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from longctx import console
from longctx.config.after_training import AdapterSettings, AfterTrainingConfig
from longctx.config.curriculum import AdvanceConfig, LearningRateConfig
from longctx.config.train import CheckpointConfig, EvaluateConfig, LoggingConfig, TrainConfig
from longctx.curriculum import Stage
from longctx.decide import Decision, Machines, decide_all
from longctx.distributed.launcher import launcher_environment
from longctx.run.training import train_run
from longctx.shape import shape_of_model
from longctx.storage.files import discard
from longctx.train.runfolder import has_step
from longctx.train.train import checked_stages

STEPS = 2


def smoke(config: TrainConfig) -> int | None:
    """Take two steps of every stage that the run has still to train. config: a settled one.

    Returns None when the run itself may follow, and otherwise the exit status: that of a failed step, or 0 under
    torchrun or srun, whose ranks train once.
    """
    folder = Path(config.folder) / "smoke"
    environment = launcher_environment()
    first, alone = environment["RANK"] == "0", int(environment["WORLD_SIZE"]) == 1
    if has_step(Path(config.folder)):
        console.say("smoke: the run has trained, so its lengths have been tried; it goes on")
        return None
    if first and folder.exists():
        discard(folder)
    world, local = (int(environment[name]) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    machines = Machines(config.launch.nproc, config.launch.nproc) if alone else Machines(world, local)
    every = replace(config, launch=replace(config.launch, until=None))  # every length is tried
    stages = checked_stages(every, world=machines.world, local_world=machines.ranks_per_node)
    shape = shape_of_model(config.model)
    heads = (shape.heads, shape.kv_heads)
    decided = decide_all(stages, config.parallel, config.engine, machines, heads, config.model.dtype)
    if status := train_run(smoke_config(config, folder, list(zip(stages, decided, strict=True)))):
        return status
    if first:
        _show(folder)
        discard(folder)
    if alone:
        return None
    if first:
        console.say("smoke: passed; start the same command without smoke=true for the run")
    return 0


def smoke_config(config: TrainConfig, folder: Path, decided: list[tuple[Stage, Decision]]) -> TrainConfig:
    """The run's config with two steps a stage, in a folder of its own.

    A step has two micro-batches of each data-parallel group where the run's has two or more, so that gradients are
    accumulated too.
    """
    stages = dict(config.curriculum.stages)  # those left out by curriculum.only too, since a theta file may name them
    for stage, decision in decided:
        batch = decision.dp * min(decision.per_group, 2 * decision.per_forward)
        rate = LearningRateConfig(peak=stage.lr.peak, warmup_steps=0, kind="constant")
        stages[stage.name] = replace(
            stages[stage.name], tokens=None, steps=STEPS, batch=batch, batch_tokens=None, lr=rate
        )
    cp = {stage.name: decision.cp for stage, decision in decided}
    return replace(
        config, smoke=False, run_dir=str(folder), cache=config.cache or f"{config.folder}/data",
        launch=replace(config.launch, until=None),
        curriculum=replace(config.curriculum, stages=stages, advance=AdvanceConfig()),
        parallel=replace(config.parallel, cp_by_stage=cp),
        logging=LoggingConfig(display=config.logging.display, every_steps=1),
        evaluate=EvaluateConfig(heldout_sequences=0),
        checkpoint=CheckpointConfig(every_minutes=0, keep=1, spare_gib=config.checkpoint.spare_gib),
        after_training=AfterTrainingConfig(lora=AdapterSettings(enabled=False)),
    )  # fmt: skip


def _show(folder: Path) -> None:
    """One line a stage: the second step's time, and the most memory a rank had."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    for row in {row["stage"]: row for row in rows if "loss" in row}.values():
        loss = "no token with loss" if row["loss"] is None else f"loss {row['loss']:.4f}"
        console.say(
            f"smoke: {row['stage']}, {row['seq_len']:,} tokens, cp {row['cp']} x dp {row['dp']}: "
            f"{row['seconds']['step']:.2f} s for {row['step_tokens']:,} tokens, {row['memory_gib']:.2f} GiB a rank, "
            f"{loss}"
        )
