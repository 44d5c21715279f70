"""`longctx train`: check what can be checked, start the ranks if need be, train, and hand over to the hooks.

One process with launch.nproc > 1 and no launcher around it starts the ranks itself; under torchrun or srun
each rank comes here on its own. Mistakes are refused before any rank starts.
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longctx import console
from longctx.config.train import TrainConfig
from longctx.train import exhausted, preflight, runfolder
from longctx.train.environment import launcher_environment, leave_launcher
from longctx.train.signals import SAVED_AND_REQUEUE, StopRequest, leaving_on_request

if TYPE_CHECKING:
    from longctx.curriculum import Stage
    from longctx.train.ranks import Ranks


def run(config: TrainConfig) -> int:
    """Train, then run the post-training hooks. Returns the exit status."""
    status = train(config)
    if status == 0 and launcher_environment()["RANK"] == "0":
        leave_launcher()  # what the hooks train beside this run is theirs to start
        with leaving_on_request(), runfolder.held(Path(config.folder)):
            status = int(_hooks().after_training(config, Path(config.folder)) or 0)
    return status


def train(config: TrainConfig, *, prepared: bool = False) -> int:
    """Train all stages, here or on ranks started for it; 0, or the status of what ended the run.

    prepared: the process that started this rank has checked everything and tokenized the documents.
    """
    environment = launcher_environment()
    world, local_world = int(environment["WORLD_SIZE"]), int(environment["LOCAL_WORLD_SIZE"])
    starts_ranks = world == 1 and config.launch.nproc > 1
    if starts_ranks:
        world = local_world = config.launch.nproc
    if starts_ranks or world == 1:
        preflight.check(config, resolve_stages(config), world=world, local_world=local_world)
    if not starts_ranks:
        return run_rank(config, prepared=prepared)
    folder = runfolder.prepare(config)
    with leaving_on_request():
        prepare_data(config, resolve_stages(config), preflight.check_libraries(config))
    from longctx.train.launch import start_ranks

    return start_ranks(config.launch, folder / "config.yaml")


def _hooks() -> Any:
    """What runs after stages and after training: named, not imported, for train and eval know nothing of
    each other.
    """
    return import_module("longctx.hooks")


def resolve_stages(config: TrainConfig) -> list[Stage]:
    """The curriculum in numbers, from the model's config.json alone."""
    from longctx.curriculum import resolve
    from longctx.plan.shape import shape_of

    shape = shape_of(config.model)
    file = "configs/curriculum"
    return resolve(config.curriculum, head_dim=shape.head_dim, rope=shape.rope, window=shape.window, file=file)


def prepare_data(config: TrainConfig, stages: list[Stage], tokenizer: Any) -> None:
    """Tokenize what the stages that are left read and plan their sequences, so that a stage whose data cannot be
    trained is refused now and not after days. Raises UserError.
    """
    from longctx.data.opening import check_stages
    from longctx.plan.shape import shape_of

    left = [stage for stage in stages if not (Path(config.folder) / "stages" / stage.name / "finished.json").exists()]
    check_stages(
        config.data, left, tokenizer=tokenizer, seed=config.seed, cache=preflight.cache_folder(config),
        vocab_size=shape_of(config.model).vocab,
    )  # fmt: skip


def run_rank(config: TrainConfig, *, prepared: bool = False) -> int:
    """This rank's part of the run, from joining the others to leaving them."""
    from longctx.train import ranks as worlds

    ranks = worlds.start(config.engine)
    stop = StopRequest()
    try:
        if not ranks.first:
            console.silence()
        _set_threads(config, ranks)
        with ExitStack() as mine:
            with ranks.agree("checking the command and the run's folder"):
                if ranks.world > 1 and not prepared and ranks.local_rank == 0:  # each node has a disk of its own
                    preflight.check(config, resolve_stages(config), world=ranks.world, local_world=ranks.local_world)
                if ranks.first:
                    mine.enter_context(runfolder.held(runfolder.prepare(config)))
            return _train(config, ranks, stop, prepared=prepared)
    finally:
        stop.close()
        worlds.stop()


def _set_threads(config: TrainConfig, ranks: Ranks) -> None:
    import torch

    if config.launch.threads is not None:
        torch.set_num_threads(config.launch.threads)
    elif "OMP_NUM_THREADS" not in os.environ or ranks.local_world > 1:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks.local_world))


def _train(config: TrainConfig, ranks: Ranks, stop: StopRequest, *, prepared: bool) -> int:
    import torch
    from transformers.utils import logging as hf_logging

    from longctx.model import LossModel, model_of
    from longctx.train import engine as engines
    from longctx.train import flops, loop
    from longctx.train.checkpoint import Checkpoints, State
    from longctx.train.display import Display
    from longctx.train.heartbeat import Progress, Watcher
    from longctx.train.metrics import Metrics
    from longctx.train.profile import ProfileWindow

    hf_logging.disable_progress_bar()  # a bar per rank says nothing that the run's own display does not
    torch.manual_seed(config.seed + ranks.rank)
    run = Path(config.folder)
    stages = resolve_stages(config)
    with ranks.agree("preparing the tokenizer and the data"):
        tokenizer = preflight.check_libraries(config)
        if not prepared and ranks.local_rank == 0:
            prepare_data(config, stages, tokenizer)
    place = engines.placer(config.engine, config.optim, config.model.dtype, ranks)
    with ranks.agree("loading the model"), exhausted.explained(config, stages[0], ranks, "loading the model for"):
        hf = model_of(config.model, place)
    elements = sum(engines.full_shape(parameter).numel() for parameter in hf.parameters())
    counted = flops.of_model(hf.config, elements, recompute=config.model.memory.checkpoint)
    model = LossModel(hf, config.model.memory, z_loss=config.optim.z_loss)
    engine = engines.build(config.engine, config.optim, model, ranks)
    progress = Progress()
    watcher = Watcher(progress, ranks.rank, ranks.world, config.guards.stall_seconds)
    checkpoints = Checkpoints(run, ranks, keep=config.checkpoint.keep, spare_gib=config.checkpoint.spare_gib)
    state = checkpoints.load(engine) or State()
    loop.find_place(state, stages)
    loop.say_resumed(state, stages)
    profile, metrics = ProfileWindow(config.profile, run, ranks), None
    if ranks.first:
        metrics = Metrics(run, config.logging, runfolder.to_dict(config), last_step=state.step, wandb_id=state.wandb_id)
    try:
        with Display(config.logging.display, config.logging.every, stages, first=ranks.first) as display:
            job = loop.Job(
                config, run, ranks, stages, engine, tokenizer, checkpoints, state, metrics, display, stop,
                counted, profile, _hooks().after_stage(config), progress,
            )  # fmt: skip
            status = loop.run_stages(job)
        if ranks.any(stop.asked):  # also after the last step: what is due after training can be done later
            status = SAVED_AND_REQUEUE
        ranks.wait()
        if status == SAVED_AND_REQUEUE:
            console.say(f"{stop.name or 'a signal'}: saved at step {state.step}; the same command continues the run")
        return status
    finally:
        watcher.close()
        profile.close()
        if metrics:
            metrics.close()
        engine.close()
