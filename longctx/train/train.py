"""Training in this process: check what can be checked, join the other ranks, load the model, train all stages.

The process is a run's only one, or one rank of several. `longctx.run` starts ranks and does the work after training.
Mistakes are refused before the model is loaded.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longctx import collector, console
from longctx.config.train import TrainConfig
from longctx.decide import Machines, decide, ring_words, with_blocks
from longctx.distributed.launcher import launcher_environment
from longctx.distributed.placement import check_even
from longctx.shape import shape_of_model
from longctx.signals import (
    SAVED_AND_REQUEUE,
    StopRequest,
    all_saved,
    continuing,
    interrupted_words,
    limit_requeues,
    stop_request,
)
from longctx.train import checks, identity, runfolder
from longctx.train.due import due, last_due
from longctx.train.runfolder import with_dtype

if TYPE_CHECKING:
    from longctx.curriculum import Stage
    from longctx.distributed.ranks import Ranks
    from longctx.train.engine import Engine
    from longctx.train.loop import AfterStage
    from longctx.train.run_context import RunContext

# Gives the patterns of the parameters that the run's adapter will not carry.
NotCarried = Callable[[], Sequence[str]]
# Refuses, before a document is read, what cannot follow the training of these stages on this many ranks.
CheckMore = Callable[[Sequence["Stage"], int], None]
# Tokenizes, with the run's tokenizer, what is read after training, and refuses what cannot be.
PrepareMore = Callable[[Any], None]


def train(
    config: TrainConfig,
    *,
    not_carried: NotCarried = list,
    after_stage: AfterStage | None = None,
    check_more: CheckMore | None = None,
    prepare_more: PrepareMore | None = None,
    checked: bool = False,
) -> int:
    """Train all stages in this process. Returns 0, or the status of what ended the run.

    not_carried: gives the patterns of the parameters that the run's adapter will not carry; optim.freeze=auto freezes
    them. after_stage: called on rank 0 for each finished stage, see `longctx.train.loop.AfterStage`. check_more:
    called once on each node after the other checks of the machine. prepare_more: called on rank 0 once the stages'
    documents are tokenized. checked: the process that started this one has checked everything and tokenized the
    documents. Raises UserError for what the checks refuse.
    """
    config = settled(config, not_carried=not_carried)
    stages = None
    if not checked and launcher_environment()["WORLD_SIZE"] == "1":
        stages = checked_stages(config, world=1, local_world=1, check_more=check_more)
    from longctx.distributed import ranks as worlds  # torch is imported only after the checks that do not need it
    from longctx.train.loop import revisit_finished
    from longctx.train.resume import already_trained

    stop = stop_request()
    interrupted_words(lambda: runfolder.where(Path(config.folder)))
    limit_requeues(config.launch.requeues)
    try:
        minutes = config.launch.meeting_minutes
        ranks = worlds.start(config.engine.device, config.engine.timeout_seconds, meeting_seconds=60 * minutes)
        check_even(ranks.places)
        if not ranks.first:
            console.silence()
        config = replace(config, model=with_blocks(config.model, ranks.device.type))
        # Another node may not see the run's folder, which says what a continued run freezes: rank 0 decides.
        config = replace(config, optim=replace(config.optim, freeze=ranks.broadcast(config.optim.freeze)))
        _set_threads(config, ranks)
        with ExitStack() as held:
            trained = False
            with ranks.agree("checking the command and the run's folder"):
                if stages is None and not checked and ranks.local_rank == 0:  # each node has its own disk
                    local = ranks.local_world
                    stages = checked_stages(config, world=ranks.world, local_world=local, check_more=check_more)
                if ranks.first:
                    held.enter_context(runfolder.held(Path(config.folder)))
                    stages = stages or resolve_stages(config)
                    trained = already_trained(Path(config.folder), stages)
                    runfolder.prepare(config, world=world_words(config, stages, ranks), trained=trained)
            with ranks.agree("reading the curriculum"):
                stages = stages or resolve_stages(config)
                several = ranks.world > ranks.local_world
                inputs = identity.inputs_of(config) if several and ranks.local_rank == 0 else None
            identity.check_nodes(ranks, inputs)
            more = None if checked else prepare_more
            context = _context(config, ranks, stages, stop, checked=checked, prepare_more=more)
            if ranks.broadcast(trained and not runfolder.checkpoints(Path(config.folder))):
                console.say("every stage is trained; no checkpoint is there any more")
                revisit_finished(context, after_stage)
                return 0
            return _train_stages(context, not_carried, after_stage)
    finally:
        stop.close()
        worlds.stop()


def world_words(config: TrainConfig, stages: Sequence[Stage], ranks: Ranks) -> list[str]:
    """The nodes and ranks of a start, and the schedule and links of each stage that it trains, in words.

    They are for the screen and config.yaml.
    """
    shape, machines = shape_of_model(config.model), Machines(ranks.world, ranks.local_world)
    names = [name for name in ranks.nodes if name] or ["this machine"]
    shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    nodes, each = max(1, ranks.world // ranks.local_world), ranks.local_world
    words = [f"{nodes} node{'s' * (nodes > 1)} of {each} rank{'s' * (each > 1)}: {shown}"]
    heads = (shape.heads, shape.kv_heads)
    for stage in due(config, stages):
        decision = decide(stage, config.parallel, config.engine, machines, heads)
        inner = decision.cp // decision.nodes
        if decision.nodes > 1 and not machines.inside_a_node(inner):
            console.remark(
                f"parallel.nodes={decision.nodes} puts the inner rings of stage {stage.name}, of {inner} ranks, "
                f"between nodes that have {each}; parallel.nodes=auto keeps them inside a node (configs/parallel)"
            )
        words.append(f"{stage.name}: dp {decision.dp} x cp {decision.cp}, {ring_words(decision, machines)}")
    return words


def settled(config: TrainConfig, *, not_carried: NotCarried = list) -> TrainConfig:
    """The config with model.dtype=auto and optim.freeze=auto decided; a run that is continued keeps its own."""
    config = with_dtype(config)
    if config.optim.freeze != "auto":
        return config
    stored = runfolder.frozen(Path(config.folder))
    return replace(config, optim=replace(config.optim, freeze=list(not_carried()) if stored is None else stored))


def checked_stages(
    config: TrainConfig, *, world: int, local_world: int, check_more: CheckMore | None = None
) -> list[Stage]:
    """The stages of a settled config, once everything that needs no ranks has been checked. Raises UserError.

    world, local_world: the ranks that will train, and those of them on this node. They must hold the stages that this
    start trains; those behind launch.until may get others (`longctx submit` with launch.nodes_by_stage), so that only
    a line says where they do not fit these. check_more: see `train`.
    """
    stages = resolve_stages(config)
    checks.check(config, stages, world=world, local_world=local_world)
    from longctx.train.machine import check_machine

    last = last_due(config, stages)
    later = [stage for stage in stages if stage.index > last]
    check_machine(config, due(config, stages), world, local_world, later=later)
    if check_more is not None:
        check_more(stages, world)
    return stages


def resolve_stages(config: TrainConfig) -> list[Stage]:
    """The curriculum in numbers, from the model's config.json alone."""
    from longctx.curriculum import resolve
    from longctx.rope import rope_of_model

    rope = rope_of_model(config.model)
    file = "configs/curriculum"
    return resolve(config.curriculum, head_dim=rope.head_dim, rope=rope.parameters, window=rope.window, file=file)


def prepare_data(config: TrainConfig, stages: list[Stage], tokenizer: Any) -> None:
    """Tokenize and plan the documents of all unfinished stages. Raises UserError.

    A later stage whose data cannot be trained is thus refused before the first one begins.
    """
    from longctx.data.stage_opening import check_stages

    left = [stage for stage in stages if not runfolder.is_finished(Path(config.folder), stage.name)]
    check_stages(
        config.data, left, tokenizer=tokenizer, seed=config.seed, cache=checks.cache_folder(config),
        vocab_size=shape_of_model(config.model).vocab,
    )  # fmt: skip


def _set_threads(config: TrainConfig, ranks: Ranks) -> None:
    import torch

    if config.launch.threads is not None:
        torch.set_num_threads(config.launch.threads)
    elif "OMP_NUM_THREADS" not in os.environ or ranks.local_world > 1:
        torch.set_num_threads(ranks.threads())


def _context(
    config: TrainConfig, ranks: Ranks, stages: list[Stage], stop: StopRequest, *, checked: bool,
    prepare_more: PrepareMore | None,
) -> RunContext:  # fmt: skip
    """Seed this rank, load the tokenizer and, unless that is done, tokenize the documents (once per node)."""
    import torch
    from transformers.utils import logging as hf_logging

    from longctx.train.machine import describe, remark_slow_dtype
    from longctx.train.run_context import RunContext

    hf_logging.disable_progress_bar()  # the run has a display of its own
    torch.manual_seed(config.seed + ranks.rank)
    shape = shape_of_model(config.model)
    if ranks.world > 1:
        console.say("; ".join(world_words(config, stages, ranks)))
    console.say(describe(config.model, shape, ranks.device.type))
    remark_slow_dtype(config.model, ranks.device.type)
    with ranks.agree("preparing the tokenizer and the data"):
        tokenizer = checks.load_checked_tokenizer(config)
        if not checked and ranks.local_rank == 0:
            prepare_data(config, stages, tokenizer)
        if prepare_more is not None and ranks.first:
            prepare_more(tokenizer)
    return RunContext(
        config=config, folder=Path(config.folder), ranks=ranks, stages=stages, tokenizer=tokenizer, stop=stop
    )


def _load_engine(context: RunContext, not_carried: NotCarried) -> Engine:
    """Load the model, ready for long sequences, into the engine that the config names."""
    from longctx.model import LossModel, model_of
    from longctx.train import engine as engines
    from longctx.train import exhausted

    collector.end_imports()  # from here on garbage is collected as usual
    config, ranks = context.config, context.ranks
    place = engines.placer(config.engine, config.optim, config.model.dtype, ranks)
    loading = exhausted.explained(config, context.stages[0], ranks, "loading the model for")
    with ranks.agree("loading the model"), loading:
        hf = model_of(config.model, place)
    model = LossModel(hf, config.model.memory, z_loss=config.optim.z_loss)
    engine = engines.build(config.engine, config.optim, model, ranks)
    _say_frozen(config, list(engine.shapes()), not_carried())
    return engine


def _train_stages(context: RunContext, not_carried: NotCarried, after_stage: AfterStage | None) -> int:
    """Load model and checkpoint, then train the stages that are left."""
    from longctx.train import loop, resume
    from longctx.train.checkpoint import Checkpoints, State
    from longctx.train.heartbeat import Progress, Watchdog
    from longctx.train.run_context import Recorder

    config, ranks, stop = context.config, context.ranks, context.stop
    engine = _load_engine(context, not_carried)
    progress = Progress()
    watchdog = Watchdog(progress, ranks.rank, ranks.world, config.guards.stall_seconds)
    wanted = config.checkpoint
    checkpoints = Checkpoints(
        context.folder, ranks, keep=wanted.keep, spare_gib=wanted.spare_gib, background=wanted.background
    )
    state = checkpoints.load(engine) or State()
    all_saved(runfolder.saved_words(state.step))
    resume.find_stage(state, context.stages)
    resume.say_resumed(state, context.stages)
    recorder = Recorder.open(context, progress, last_step=state.step)
    training = loop.Training(
        context=context, engine=engine, state=state, recorder=recorder, after_stage=after_stage,
        saving=loop.Saving(checkpoints=checkpoints, step=state.step),
    )  # fmt: skip
    try:
        with recorder.display:
            status = loop.run_stages(training)
        if ranks.any(stop.asked):  # also after the last step: what follows training can be done later
            status = SAVED_AND_REQUEUE
        ranks.barrier()
        if status == SAVED_AND_REQUEUE:
            saved = runfolder.saved_words(training.saving.step)
            console.last_line(f"{stop.name or 'a signal'}: {saved}; {continuing()}")
        return status
    finally:
        watchdog.close()
        checkpoints.abandon()
        recorder.close()
        engine.close()


def _say_frozen(config: TrainConfig, trained: Sequence[str], not_carried: Sequence[str]) -> None:
    """Say in one line what is trained but missing in the adapter, or else what is not trained."""
    lost = [name.removeprefix("model.") for name in trained if any(fnmatch(name, p) for p in not_carried)]
    if lost:
        more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
        console.say(
            f"[yellow]trained, but not carried by the adapter:[/] {lost[0]}{more}; optim.freeze=auto leaves them as "
            "they are, after_training.lora.embeddings=true carries embeddings, after_training.lora.profile=full head "
            "and norms"
        )
    elif config.optim.freeze:
        console.say(f"frozen (optim.freeze): {', '.join(config.optim.freeze)}")
