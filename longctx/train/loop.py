"""The training loop over stages: train, save, export, hand over to the next stage.

A hand-off rebuilds RoPE, the context-parallel groups, the layout and the data. Weights, optimizer and the global data
position carry over, and no parameter is resharded, because every engine spans all ranks whatever cp is. Each part of a
stage's end leaves a mark on disk, so that a run killed there continues exactly where it was.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from longctx import console
from longctx.data.loader import Loader
from longctx.errors import RunFailed
from longctx.signals import SAVED_AND_REQUEUE
from longctx.storage.files import write_text
from longctx.train import flops
from longctx.train.checkpoint import Checkpoints, State
from longctx.train.due import last_due
from longctx.train.engine import Engine
from longctx.train.exhausted import explained
from longctx.train.guards import Guards
from longctx.train.lead import Lead
from longctx.train.metrics import memory_gib
from longctx.train.open_stage import OpenStage, open_stage
from longctx.train.resume import check_plan, enter_stage, left_words
from longctx.train.run_context import Recorder, RunContext
from longctx.train.runfolder import ended_stage, exported, is_finished, saved_words, stage_folder
from longctx.train.step import Stepper, StepReport, Timer

if TYPE_CHECKING:
    from longctx.curriculum import Stage

# after_stage(stage, folder of its exported model, folder for results): called on rank 0 while the other ranks wait, at
# the end of each stage, and again at each later start of the run, whose settings may be others.
AfterStage = Callable[["Stage", Path, Path], None]


@dataclass(kw_only=True)
class Saving:
    """The checkpoints of a run, and what is known about the last one.

    step: the last step that is saved. at: when its save began or ended (time.monotonic). held: seconds for which saves
    have stopped training since the last step's line of metrics. lead: warns when a save does not fit into
    the seconds that a scheduler gives after its signal.
    """

    checkpoints: Checkpoints
    step: int
    at: float = field(default_factory=time.monotonic)
    held: float = 0.0
    lead: Lead = field(default_factory=Lead)


@dataclass(kw_only=True)
class Training:
    """A run in progress on one rank."""

    context: RunContext
    engine: Engine
    state: State
    saving: Saving
    recorder: Recorder
    after_stage: AfterStage | None = None


def run_stages(training: Training) -> int:
    """Train the stages that are left, up to launch.until.

    Returns 0, or 75 when a signal asked to stop (the state is saved). A stage that an earlier start has finished is not
    opened again: its documents may be gone, and it need not divide over the ranks of this start.
    """
    context, state, progress = training.context, training.state, training.recorder.progress
    progress.at("start", state.step)
    revisit_finished(context, training.after_stage)
    last = last_due(context.config, context.stages)
    if context.config.launch.until and (state.stage, state.ended) >= (last, True):
        console.say(f"launch.until={context.config.launch.until}: every stage up to it is trained")
    for stage in context.stages[state.stage : last + 1]:
        if _stopping(training):
            return SAVED_AND_REQUEUE
        if stage.index > state.stage or not state.planned:
            enter_stage(state, stage)
        progress.at("start", state.step)
        ended = state.ended  # by an earlier start
        if ended and _recorded_end(training, stage):
            continue
        with explained(context.config, stage, context.ranks, "training"):
            opened = open_stage(context.config, stage, context.ranks, training.engine.model, context.tokenizer)
            try:
                with context.ranks.agree(f"comparing the sequences of stage {stage.name}"):
                    check_plan(state, opened.data.plan, context.config.accept)
                if not state.ended and (code := _train_stage(training, stage, opened)):
                    return code
                if _stopping(training):
                    return SAVED_AND_REQUEUE
                if ended or not _recorded_end(training, stage):
                    _finish(training, stage, opened)
            finally:
                opened.close()
    return 0


def revisit_finished(context: RunContext, after_stage: AfterStage | None) -> None:
    """Call after_stage for the stages that an earlier start of the run finished."""
    if after_stage is None:
        return
    with context.ranks.agree("what follows the finished stages"):
        for stage in context.stages if context.ranks.first else []:
            if is_finished(context.folder, stage.name):
                _after_stage(context, stage, after_stage)


def _after_stage(context: RunContext, stage: Stage, after_stage: AfterStage) -> None:
    """Call after_stage for an exported stage; one whose export the user has removed keeps what it has."""
    folder = stage_folder(context.folder, stage.name)
    if exported(folder):
        (folder / "eval").mkdir(exist_ok=True)
        after_stage(stage, folder / "model", folder / "eval")


def _stopping(training: Training) -> bool:
    """Whether some rank was asked to stop.

    If none was and all steps are saved, a signal ends a process of its own at once, from here to the next step:
    evaluation, exports, adapters and tokenizing may take long.
    """
    if training.context.ranks.any(training.context.stop.asked):
        return True
    if training.saving.step == training.state.step:
        training.context.stop.saved(saved_words(training.state.step))
    return False


def _train_stage(training: Training, stage: Stage, opened: OpenStage) -> int:
    """Train the steps of a stage that are left; 75 when a signal asked to stop."""
    context, state, recorder = training.context, training.state, training.recorder
    guards = Guards(
        context.config.guards, context.folder, context.ranks, state.recent_losses, spikes=state.spikes, mute=state.mute
    )
    stop = context.stop
    stepper = Stepper(training.engine, context.ranks, guards, recorder.progress, opened.cp_size, lambda: stop.asked)
    recorder.display.stage(stage, state.stage_step, opened.words)
    end = stage.steps * stage.batch
    stop.unsaved()
    with Loader(opened.micro_batches, batch=stage.batch, cursor=state.cursor, end=end) as loader:
        timer = Timer(context.ranks.device)
        while not state.ended:
            timer.start()
            began = time.perf_counter()
            recorder.progress.at("data", state.step)
            recorder.profile.before(state.step)
            batches = next(loader)
            lr = stage.lr.at(state.stage_step)
            votes = [_save_due(training), training.saving.checkpoints.writing]
            report = stepper.take(batches, lr, step=state.step, timer=timer, votes=votes)
            if report is None:
                _settle(training)
                if training.saving.step != state.step:
                    _save(training, stage, at_once=True)
                return SAVED_AND_REQUEUE
            seconds = time.perf_counter() - began
            _advance(state, stage, report, seconds)
            state.spikes, state.mute = guards.spikes, guards.mute
            recorder.profile.after(state.step)
            _log(training, stage, opened, report, lr, seconds)
            due, writing = report.votes
            if not writing:
                _settle(training)
            if state.ended or due:
                _save(training, stage, at_once=state.ended)
            training.saving.lead.check(report.wait, context.ranks)
    return 0


def _advance(state: State, stage: Stage, report: StepReport, seconds: float) -> None:
    state.step += 1
    state.stage_step += 1
    state.cursor += stage.batch
    state.tokens += report.tokens
    state.seconds += seconds
    state.stage_seconds += seconds
    state.skipped += report.skipped
    # A step is skipped for a loss that is too high, which would make a loss that still falls look flat.
    if stage.advance is not None and report.tail_loss is not None and not report.skipped:
        state.tail_losses.append(report.tail_loss)
    early = stage.advance is not None and stage.advance.flattened(state.tail_losses, stage.steps)
    state.ended = state.stage_step >= stage.steps or early


def _save_due(training: Training) -> bool:
    """Whether this rank wants a checkpoint after the coming step; for the minutes, rank 0's clock decides."""
    checkpoint = training.context.config.checkpoint
    by_step = checkpoint.every_steps > 0 and (training.state.step + 1) % checkpoint.every_steps == 0
    since = time.monotonic() - training.saving.at
    by_clock = training.context.ranks.first and checkpoint.every_minutes > 0 and since > 60 * checkpoint.every_minutes
    return by_step or by_clock


def _save(training: Training, stage: Stage, *, at_once: bool) -> None:
    """Save the state. at_once: training waits until it is written, at a stage's end and where the run stops."""
    state, saving, engine = training.state, training.saving, training.engine
    training.recorder.progress.at("save", state.step)
    _settle(training)
    state.written_by = {"world": training.context.ranks.world, **engine.facts}
    began = time.monotonic()
    write = saving.checkpoints.save if at_once else saving.checkpoints.start
    if write(engine, state, stage.name):
        saving.step = state.step
    saving.lead.save_seconds = max(saving.checkpoints.seconds, time.monotonic() - began)
    saving.at = time.monotonic()
    saving.held += saving.at - began


def _settle(training: Training) -> None:
    """Publish the save that all ranks have written, if there is one; every rank calls this after the same step."""
    saving = training.saving
    if not saving.checkpoints.pending:
        return
    began = time.monotonic()
    step = saving.checkpoints.settle()
    saving.step = saving.step if step is None else step
    saving.held += time.monotonic() - began


def _log(training: Training, stage: Stage, opened: OpenStage, report: StepReport, lr: float, seconds: float) -> None:
    """Show the step on the screen and write its line of metrics.jsonl."""
    state, recorder, context = training.state, training.recorder, training.context
    if report.skipped:
        spike = f"loss {report.loss:.4f} is a spike (guards.spike_factor={context.config.guards.spike_factor})"
        why = spike if report.weight > 0 else "no token of the batch carries loss"
        recorder.display.say(f"[yellow]step {state.step} skipped:[/] {why}")
    if recorder.metrics is None:
        return
    world, device, per_node = context.ranks.world, context.ranks.device, context.ranks.local_world
    rate = opened.flops.model(report.tokens, report.pairs) / seconds / world
    executed = opened.flops.hardware(report.tokens, report.pairs) / seconds / world
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    peak = flops.peak_flops(name, context.config.logging.peak_tflops, context.config.model.dtype)
    held = {"save_seconds": training.saving.held} if training.saving.held else {}  # for which a save held this step up
    training.saving.held = 0.0
    line = {
        "step": state.step, "stage": stage.name, "stage_index": stage.index, "stage_step": state.stage_step,
        "loss": report.loss if report.weight > 0 else None, "tail_loss": report.tail_loss,
        "z_loss": report.z_loss or None,
        "grad_norm": report.grad_norm, "lr": lr,
        "skipped": report.skipped, "tokens": state.tokens, "step_tokens": report.tokens,
        "weight": report.weight, "cursor": state.cursor, "tokens_per_second": report.tokens / seconds,
        "tokens_per_second_per_rank": report.tokens / seconds / world, "model_tflops": rate / 1e12,
        "mfu": rate / peak if peak else None, "hfu": executed / peak if peak else None,
        "memory_gib": memory_gib(device), "theta": stage.theta, "seq_len": stage.seq_len,
        "cp": opened.cp_size, "dp": world // opened.cp_size,
        "nodes": max(1, world // per_node), "ranks_per_node": per_node, "rings": opened.rings,
        "data": {key: opened.data.stats()[key] for key in ("padding", "cut", "epochs")},
        "seconds": {"step": seconds, **report.seconds}, **held, "time": time.time(),
    }  # fmt: skip
    recorder.metrics.step(line)
    recorder.display.step(stage, state.stage_step, line)


def _recorded_end(training: Training, stage: Stage) -> bool:
    """Whether finished.json has the end of a trained stage already, and its model is there; a collective."""
    context, state, recorder = training.context, training.state, training.recorder
    folder = stage_folder(context.folder, stage.name)
    mark = folder / "finished.json"
    if stage.name not in state.trained:
        state.trained.append(stage.name)
    ended: dict[str, Any] | None = None
    with context.ranks.agree(f"reading {mark}"):
        if context.ranks.first and exported(folder):
            ended = ended_stage(mark, "the stage's end is done again")
    ended = context.ranks.broadcast(ended)
    if ended is not None and recorder.metrics:
        recorder.metrics.stage_ended(state.step, state.tokens, ended["heldout_loss"])
    return ended is not None


def _finish(training: Training, stage: Stage, opened: OpenStage) -> None:
    """Export and evaluate a trained stage; finished.json marks that it is done."""
    context, state, recorder = training.context, training.state, training.recorder
    folder = stage_folder(context.folder, stage.name)
    mark = folder / "finished.json"
    recorder.progress.at("hand-off", state.step)
    if training.saving.step == 0 and stage is not context.stages[-1]:
        console.say(
            f"[yellow]{stage.name} ends, and the run has no checkpoint:[/] until one is written, the same command "
            "cannot continue the run; free some space (checkpoint.spare_gib)"
        )
    heldout = opened.heldout_loss(training.engine, context.ranks)
    try:
        opened.export(training.engine, context.ranks, folder / "model")
    except RunFailed as error:
        raise RunFailed(f"{error}; {left_words(context.folder, context.stages)}") from error
    facts = {
        "stage": stage.name, "index": stage.index, "step": state.step, "steps": state.stage_step,
        "planned_steps": stage.steps, "tokens": state.cursor * stage.seq_len,
        "seconds": state.stage_seconds, "seq_len": stage.seq_len, "theta": stage.theta,
        "heldout_loss": heldout, "model": str((folder / "model").relative_to(context.folder)),
    }  # fmt: skip
    if context.ranks.first:
        words = "" if heldout is None else f", held-out loss {heldout:.4f}"
        recorder.display.say(
            f"[bold]{stage.name}[/] done in {state.stage_seconds:.0f} s{_early_words(state, stage)}{words}: "
            f"{folder / 'model'}"
        )
        if recorder.metrics:
            recorder.metrics.stage_ended(state.step, state.tokens, heldout)
        if training.after_stage is not None:
            _after_stage(context, stage, training.after_stage)
        write_text(mark, json.dumps(facts, indent=1))
    context.ranks.barrier()


def _early_words(state: State, stage: Stage) -> str:
    """Why a stage has fewer steps than planned, in words; "" where it has all."""
    if stage.advance is None or state.stage_step >= stage.steps:
        return ""
    drop = f"{100 * stage.advance.min_drop:.3g} % in {stage.advance.steps} steps"
    return (f", left early after {state.stage_step} of {stage.steps} steps (advance: the loss on the last quarter of "
            f"the sequences fell by less than {drop})")  # fmt: skip
