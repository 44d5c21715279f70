"""The loop over stages: train, save, export, hand over. What it needs it is given, evaluation included.

A stage hand-off rebuilds RoPE, the context-parallel groups, the layout and the data; weights, optimizer and
the global data position carry over, and no parameter is resharded, because every engine spans all ranks
whatever cp is. Everything at a stage's end leaves a mark, so a run killed there goes on exactly where it was.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from longctx import console
from longctx.data.loader import Loader
from longctx.distributed.ranks import Ranks
from longctx.errors import UserError
from longctx.shape import Flops
from longctx.signals import SAVED_AND_REQUEUE, StopRequest
from longctx.storage.files import write_text
from longctx.train import flops
from longctx.train.checkpoint import Checkpoints, State
from longctx.train.display import Display
from longctx.train.engine import Engine
from longctx.train.exhausted import explained
from longctx.train.guards import Guards
from longctx.train.heartbeat import Progress
from longctx.train.lead import Lead
from longctx.train.metrics import Metrics, memory_gib
from longctx.train.profile import ProfileWindow
from longctx.train.stage import OpenStage, open_stage
from longctx.train.step import Stepper, StepReport, Timer

if TYPE_CHECKING:
    from longctx.config.train import TrainConfig
    from longctx.curriculum import Stage

CONFIG_FILE = "configs/train.yaml"
# evaluate(stage, folder of its exported model, folder for results): called on rank 0, the others wait.
Evaluate = Callable[["Stage", Path, Path], None]


@dataclass
class Job:
    """Everything a run holds on one rank. metrics: rank 0 only."""

    config: TrainConfig
    run: Path
    ranks: Ranks
    stages: Sequence[Stage]
    engine: Engine
    tokenizer: Any
    checkpoints: Checkpoints
    state: State
    metrics: Metrics | None
    display: Display
    stop: StopRequest
    flops: Flops
    profile: ProfileWindow
    evaluate: Evaluate | None = None
    progress: Progress = field(default_factory=Progress)
    saved_at: float = field(default_factory=time.monotonic)
    saved_step: int = 0
    lead: Lead = field(default_factory=Lead)


def run_stages(job: Job) -> int:
    """Train what is left. Returns 0, or 75 when a signal asked to stop (the state is saved)."""
    job.progress.at("start", job.state.step)
    for stage in job.stages[job.state.stage :]:
        if _stopping(job):
            return SAVED_AND_REQUEUE
        if stage.index > job.state.stage or not job.state.planned:
            _enter(job.state, stage)
        job.progress.at("start", job.state.step)
        with explained(job.config, stage, job.ranks, "training"):
            opened = open_stage(job.config, stage, job.ranks, job.engine.model, job.tokenizer)
            try:
                if not job.state.ended and (code := _train(job, stage, opened)):
                    return code
                if _stopping(job):
                    return SAVED_AND_REQUEUE
                _finish(job, stage, opened)
            finally:
                opened.close()
    return 0


def _stopping(job: Job) -> bool:
    """Whether some rank was asked to stop. If not, and all steps are saved, a signal ends a process of its own at once
    from here to the next step: evaluation, exports, adapters and tokenizing may take long.
    """
    if job.ranks.any(job.stop.asked):
        return True
    if job.saved_step == job.state.step:
        job.stop.saved(saved_words(job.state.step))
    return False


def saved_words(step: int) -> str:
    return f"saved at step {step}" if step else "nothing was trained"


def _enter(state: State, stage: Stage) -> None:
    state.stage, state.stage_step, state.cursor, state.ended = stage.index, 0, 0, False
    state.stage_name, state.planned = stage.name, planned(stage)
    state.stage_seconds = 0.0
    state.recent_losses, state.tail_losses = [], []


def planned(stage: Stage) -> list[int]:
    """What a stage's documents were drawn for: with other numbers the cursor would point into other documents."""
    return [stage.seq_len, stage.batch, stage.steps]


def find_place(state: State, stages: Sequence[Stage]) -> None:
    """Let the state of a checkpoint point at its stage again, wherever the curriculum has it now.

    Raises UserError when the stage is gone, was planned otherwise, or has untrained stages before it.
    """
    if not state.planned:
        return
    names, new_name = [stage.name for stage in stages], "or take a new name=..."
    if state.stage_name not in names:
        raise UserError(
            f"the run stands in stage {state.stage_name}, which the curriculum no longer has (stages: "
            f"{', '.join(names)}); put it back, {new_name} (configs/curriculum)"
        )
    index = names.index(state.stage_name)
    if planned(stages[index]) != state.planned:
        words = "seq_len={} batch={} steps={}"
        was, now = words.format(*state.planned), words.format(*planned(stages[index]))
        raise UserError(
            f"curriculum.stages.{state.stage_name} was planned with {was} and stands at step {state.stage_step}; with "
            f"{now} its documents would be drawn anew and some read twice. Leave it as it was and add a stage after "
            f"it, {new_name} (configs/curriculum)"
        )
    untrained = [name for name in names[:index] if name not in state.trained]
    if untrained:
        raise UserError(
            f"the run stands in stage {state.stage_name}, and {', '.join(untrained)} before it was never trained; give "
            f"it a place after {state.stage_name}, {new_name} (configs/curriculum)"
        )
    state.stage = index


def _train(job: Job, stage: Stage, opened: OpenStage) -> int:
    """Steps of one stage from where the state stands; 75 when told to stop."""
    state, config = job.state, job.config
    guards = Guards(config.guards, job.run, job.ranks, state.recent_losses)
    stepper = Stepper(job.engine, job.ranks, guards, job.progress, opened.cp_size, lambda: job.stop.asked)
    job.display.stage(stage, state.stage_step, opened.words)
    end = stage.steps * stage.batch
    job.stop.unsaved()
    with Loader(opened.window, batch=stage.batch, cursor=state.cursor, end=end) as loader:
        while not state.ended:
            timer = Timer(job.ranks.device)
            began = time.perf_counter()
            job.progress.at("data", state.step)
            job.profile.before(state.step)
            window = next(loader)
            lr = stage.lr.at(state.stage_step)
            report = stepper.take(window, lr, step=state.step, timer=timer, votes=[_save_due(job)])
            if report is None:
                if job.saved_step != state.step:
                    _save(job, stage)
                return SAVED_AND_REQUEUE
            seconds = time.perf_counter() - began
            _advance(state, stage, report, seconds)
            job.profile.after(state.step)
            _log(job, stage, opened, report, lr, seconds)
            if state.ended or report.votes[0]:
                _save(job, stage)
            job.lead.check(report.wait, job.ranks)
    return 0


def _advance(state: State, stage: Stage, report: StepReport, seconds: float) -> None:
    state.step += 1
    state.stage_step += 1
    state.cursor += stage.batch
    state.tokens += report.tokens
    state.seconds += seconds
    state.stage_seconds += seconds
    state.skipped += report.skipped
    if stage.advance is not None and report.tail_loss is not None:
        state.tail_losses.append(report.tail_loss)
    early = stage.advance is not None and stage.advance.flattened(state.tail_losses, stage.steps)
    state.ended = state.stage_step >= stage.steps or early


def _save_due(job: Job) -> bool:
    """Whether this rank finds that a checkpoint is due after the coming step (rank 0's clock decides)."""
    every, minutes = job.config.checkpoint.every, job.config.checkpoint.minutes
    by_step = every > 0 and (job.state.step + 1) % every == 0
    by_clock = job.ranks.first and minutes > 0 and time.monotonic() - job.saved_at > 60 * minutes
    return by_step or by_clock


def _save(job: Job, stage: Stage) -> None:
    job.progress.at("save", job.state.step)
    job.state.written_by = {"world": job.ranks.world, **job.engine.facts}
    began = time.monotonic()
    if job.checkpoints.save(job.engine, job.state, stage.name):
        job.saved_step = job.state.step
    job.saved_at = time.monotonic()
    job.lead.save_seconds = job.saved_at - began


def _log(job: Job, stage: Stage, opened: OpenStage, report: StepReport, lr: float, seconds: float) -> None:
    if report.skipped:
        spike = f"loss {report.loss:.4f} is a spike (guards.spike={job.config.guards.spike})"
        why = spike if report.weight > 0 else "no token of the batch carries loss"
        job.display.say(f"[yellow]step {job.state.step} skipped:[/] {why}")
    if job.metrics is None:
        return
    state, world = job.state, job.ranks.world
    rate = job.flops.model(report.tokens, report.pairs) / seconds / world
    executed = job.flops.hardware(report.tokens, report.pairs) / seconds / world
    name = torch.cuda.get_device_name(job.ranks.device) if job.ranks.device.type == "cuda" else None
    peak = flops.peak_flops(name, job.config.logging.peak_tflops)
    line = {
        "step": state.step, "stage": stage.name, "stage_index": stage.index, "stage_step": state.stage_step,
        "loss": report.loss if report.weight > 0 else None, "tail_loss": report.tail_loss,
        "grad_norm": report.grad_norm, "lr": lr,
        "skipped": report.skipped, "tokens": state.tokens, "step_tokens": report.tokens,
        "weight": report.weight, "cursor": state.cursor, "tokens_per_second": report.tokens / seconds,
        "tokens_per_second_per_rank": report.tokens / seconds / world, "model_tflops": rate / 1e12,
        "mfu": rate / peak if peak else None, "hfu": executed / peak if peak else None,
        "memory_gib": memory_gib(job.ranks.device), "theta": stage.theta, "seq_len": stage.seq_len,
        "cp": opened.cp_size, "dp": world // opened.cp_size,
        "data": {key: opened.data.stats()[key] for key in ("padding", "cut", "epochs")},
        "seconds": {"step": seconds, **report.seconds}, "time": time.time(),
    }  # fmt: skip
    job.metrics.step(line)
    job.display.step(stage, state.stage_step, line)


def _finish(job: Job, stage: Stage, opened: OpenStage) -> None:
    """Export, held-out loss and evaluation of a trained stage, once; finished.json is the mark."""
    folder = job.run / "stages" / stage.name
    mark = folder / "finished.json"
    if stage.name not in job.state.trained:
        job.state.trained.append(stage.name)
    if job.ranks.broadcast(mark.exists()):
        if job.metrics:
            job.metrics.stage_ended(job.state.step, job.state.tokens, json.loads(mark.read_text())["heldout_loss"])
        return
    job.progress.at("hand-off", job.state.step)
    heldout = opened.heldout_loss(job.engine, job.ranks)
    opened.export(job.engine, job.ranks, folder / "model")
    facts = {
        "stage": stage.name, "index": stage.index, "steps": job.state.stage_step,
        "tokens": job.state.cursor * stage.seq_len,
        "seconds": job.state.stage_seconds, "seq_len": stage.seq_len, "theta": stage.theta,
        "heldout_loss": heldout, "model": str((folder / "model").relative_to(job.run)),
    }  # fmt: skip
    if job.ranks.first:
        words = "" if heldout is None else f", held-out loss {heldout:.4f}"
        job.display.say(f"[bold]{stage.name}[/] done in {job.state.stage_seconds:.0f} s{words}: {folder / 'model'}")
        if job.metrics:
            job.metrics.stage_ended(job.state.step, job.state.tokens, heldout)
        if job.evaluate is not None:
            (folder / "eval").mkdir(exist_ok=True)
            job.evaluate(stage, folder / "model", folder / "eval")
        write_text(mark, json.dumps(facts, indent=1))
    job.ranks.wait()


def say_resumed(state: State, stages: Sequence[Stage]) -> None:
    if state.step:
        name = stages[min(state.stage, len(stages) - 1)].name
        console.say(f"continuing at step {state.step} (stage {name}, {state.tokens:,} tokens done)")
