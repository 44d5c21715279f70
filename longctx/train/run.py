"""`longctx train`: check what can be checked, start the ranks if need be, train, and hand over to the hooks.

One process with launch.nproc > 1 and no launcher around it starts the ranks itself; under torchrun or srun
each rank comes here on its own. Mistakes are refused before any rank starts.
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from dataclasses import replace
from fnmatch import fnmatch
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longctx import console
from longctx.config.train import TrainConfig
from longctx.distributed import ranks as worlds
from longctx.distributed.launcher import launcher_environment, leave_launcher
from longctx.shape import shape_of_model
from longctx.signals import SAVED_AND_REQUEUE, StopRequest, all_saved, interrupted_words, stop_request
from longctx.train import exhausted, preflight, runfolder
from longctx.train.machine import check_machine, describe
from longctx.train.runfolder import with_dtype

if TYPE_CHECKING:
    from longctx.curriculum import Stage
    from longctx.distributed.ranks import Ranks


def run(config: TrainConfig) -> int:
    """Train, then run the post-training hooks. Returns the exit status."""
    config = settled(config)
    status = train(config)
    if status == 0 and launcher_environment()["RANK"] == "0":
        leave_launcher()  # what the hooks train beside this run is theirs to start
        all_saved("training is done")
        with runfolder.held(Path(config.folder)):
            status = int(_hooks().after_training(config, Path(config.folder)) or 0)
    return status


def train(config: TrainConfig, *, prepared: bool = False) -> int:
    """Train all stages, here or on ranks started for it; 0, or the status of what ended the run.

    prepared: the process that started this rank has checked everything and tokenized the documents.
    """
    config = settled(config)
    environment = launcher_environment()
    world, local_world = int(environment["WORLD_SIZE"]), int(environment["LOCAL_WORLD_SIZE"])
    starts_ranks = world == 1 and config.launch.nproc > 1
    if starts_ranks:
        world = local_world = config.launch.nproc
    if starts_ranks or world == 1:
        stages = resolve_stages(config)
        preflight.check(config, stages, world=world, local_world=local_world)
        check_machine(config, stages, world, local_world)
    if not starts_ranks:
        return run_rank(config, prepared=prepared)
    with runfolder.held(Path(config.folder)):
        folder = runfolder.prepare(config)
    prepare_data(config, resolve_stages(config), preflight.check_libraries(config))
    from longctx.train.launch import start_ranks

    return start_ranks(config.launch, folder / "config.yaml", preflight.cache_folder(config))


def settled(config: TrainConfig) -> TrainConfig:
    """The config with model.dtype=auto and optim.freeze=auto decided, or as the run that is continued began."""
    config = with_dtype(config)
    if config.optim.freeze != "auto":
        return config
    began = runfolder.frozen(Path(config.folder))
    freeze = _hooks().left_out(config) if began is None else began
    return replace(config, optim=replace(config.optim, freeze=freeze))


def _hooks() -> Any:
    """What runs after stages and after training: named, not imported, for train and eval know nothing of
    each other.
    """
    return import_module("longctx.hooks")


def resolve_stages(config: TrainConfig) -> list[Stage]:
    """The curriculum in numbers, from the model's config.json alone."""
    from longctx.curriculum import resolve
    from longctx.rope import rope_of_model

    rope = rope_of_model(config.model)
    file = "configs/curriculum"
    return resolve(config.curriculum, head_dim=rope.head_dim, rope=rope.parameters, window=rope.window, file=file)


def prepare_data(config: TrainConfig, stages: list[Stage], tokenizer: Any) -> None:
    """Tokenize and plan the documents of the stages that are left. Raises UserError.

    A stage whose data cannot be trained is thus refused now and not after days.
    """
    from longctx.data.stage_opening import check_stages

    left = [stage for stage in stages if not (Path(config.folder) / "stages" / stage.name / "finished.json").exists()]
    check_stages(
        config.data, left, tokenizer=tokenizer, seed=config.seed, cache=preflight.cache_folder(config),
        vocab_size=shape_of_model(config.model).vocab,
    )  # fmt: skip


def run_rank(config: TrainConfig, *, prepared: bool = False) -> int:
    """This rank's part of the run, from joining the others to leaving them."""
    stop = stop_request()
    interrupted_words(lambda: runfolder.where(Path(config.folder)))
    try:
        ranks = worlds.start(config.engine.device, config.engine.timeout_seconds)
        if not ranks.first:
            console.silence()
        # Rank 0 may be the only one that sees what the run in the folder began with.
        config = replace(config, optim=replace(config.optim, freeze=ranks.broadcast(config.optim.freeze)))
        _set_threads(config, ranks)
        with ExitStack() as mine:
            with ranks.agree("checking the command and the run's folder"):
                if ranks.world > 1 and not prepared and ranks.local_rank == 0:  # each node has a disk of its own
                    stages = resolve_stages(config)
                    preflight.check(config, stages, world=ranks.world, local_world=ranks.local_world)
                    check_machine(config, stages, ranks.world, ranks.local_world)
                if ranks.first:
                    mine.enter_context(runfolder.held(Path(config.folder)))
                    runfolder.prepare(config)
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
    from longctx.train import loop
    from longctx.train.checkpoint import Checkpoints, State
    from longctx.train.display import Display
    from longctx.train.heartbeat import Progress, Watcher
    from longctx.train.metrics import Metrics
    from longctx.train.profile import ProfileWindow

    hf_logging.disable_progress_bar()  # a bar per rank says nothing that the run's own display does not
    torch.manual_seed(config.seed + ranks.rank)
    run = Path(config.folder)
    stages = resolve_stages(config)
    console.say(describe(config.model, shape_of_model(config.model), ranks.device.type))
    with ranks.agree("preparing the tokenizer and the data"):
        tokenizer = preflight.check_libraries(config)
        if not prepared and ranks.local_rank == 0:
            prepare_data(config, stages, tokenizer)
    place = engines.placer(config.engine, config.optim, config.model.dtype, ranks)
    with ranks.agree("loading the model"), exhausted.explained(config, stages[0], ranks, "loading the model for"):
        hf = model_of(config.model, place)
    counted = shape_of_model(config.model).flops(recompute=config.model.memory.checkpoint)
    model = LossModel(hf, config.model.memory, z_loss=config.optim.z_loss)
    engine = engines.build(config.engine, config.optim, model, ranks)
    _say_frozen(config, list(engine.shapes()))
    progress = Progress()
    watcher = Watcher(progress, ranks.rank, ranks.world, config.guards.stall_seconds)
    checkpoints = Checkpoints(run, ranks, keep=config.checkpoint.keep, spare_gib=config.checkpoint.spare_gib)
    state = checkpoints.load(engine) or State()
    all_saved(loop.saved_words(state.step))
    loop.find_place(state, stages)
    loop.say_resumed(state, stages)
    profile, metrics = ProfileWindow(config.profile, run, ranks), None
    if ranks.first:
        metrics = Metrics(run, config.logging, runfolder.to_dict(config), last_step=state.step)
    try:
        with Display(config.logging.display, config.logging.every, stages, first=ranks.first) as display:
            job = loop.Job(
                config, run, ranks, stages, engine, tokenizer, checkpoints, state, metrics, display, stop,
                counted, profile, _hooks().after_stage(config), progress, saved_step=state.step,
            )  # fmt: skip
            status = loop.run_stages(job)
        if ranks.any(stop.asked):  # also after the last step: what is due after training can be done later
            status = SAVED_AND_REQUEUE
        ranks.wait()
        if status == SAVED_AND_REQUEUE:
            saved = loop.saved_words(job.saved_step)
            console.say(f"longctx: {stop.name or 'a signal'}: {saved}; the same command continues the run")
        return status
    finally:
        watcher.close()
        profile.close()
        if metrics:
            metrics.close()
        engine.close()


def _say_frozen(config: TrainConfig, trained: list[str]) -> None:
    """One line about what is not trained, or is trained and will be missing in the adapter."""
    lost = [name.removeprefix("model.") for name in trained if any(fnmatch(name, p) for p in _hooks().left_out(config))]
    if lost:
        more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
        console.say(
            f"[yellow]trained, but not carried by the adapter:[/] {lost[0]}{more}; optim.freeze=auto leaves them as "
            "they are, hooks.lora.embeddings=true carries embeddings, hooks.lora.profile=full head and norms"
        )
    elif config.optim.freeze:
        console.say(f"frozen (optim.freeze): {', '.join(config.optim.freeze)}")
