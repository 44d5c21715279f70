"""The place in the curriculum at which a run continues."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from longctx import console
from longctx.errors import UserError
from longctx.storage.files import read_record
from longctx.train import runfolder
from longctx.train.checkpoint import State, stored_state

if TYPE_CHECKING:
    from longctx.curriculum import Stage


DRAWN_BY = ("data", "curriculum", "seed")  # sections of the config with whose change documents are drawn otherwise


def planned(stage: Stage) -> list[int]:
    """The numbers that a stage's documents were drawn for.

    With other numbers the cursor would point into other documents.
    """
    return [stage.seq_len, stage.batch, stage.steps]


def enter_stage(state: State, stage: Stage) -> None:
    """Move the state to the beginning of a stage."""
    state.stage, state.stage_step, state.cursor, state.ended = stage.index, 0, 0, False
    state.stage_name, state.planned, state.plan = stage.name, planned(stage), ""
    state.stage_seconds = 0.0
    state.recent_losses, state.spikes, state.mute = [], 0, 0
    state.tail_losses = []


def check_plan(state: State, plan: str, accept: Sequence[str]) -> None:
    """Compare the fingerprint of a stage's sequences with that of before the stop, and keep it in the state.

    Another mix, seed or document, but also another release of numpy, whose random numbers draw the documents, gives
    other sequences. Raises UserError where some of those are still to be trained on and `accept` names no such change.
    """
    if state.cursor and not state.ended and state.plan and state.plan != plan:
        seq_len, batch, steps = state.planned
        words = (
            f"stage {state.stage_name} stopped after {state.cursor:,} of its {batch * steps:,} sequences of "
            f"{seq_len:,} tokens, and what is left is drawn otherwise now, so that some documents are read twice and "
            "others never"
        )
        if not any(item.partition(".")[0] in DRAWN_BY for item in accept):
            raise UserError(
                f"{words}. Put back what has changed since (the installed numpy, whose random numbers draw them, or "
                "longctx itself), or, if it is meant, continue with 'accept=[data]'"
            )
        console.remark(words)
    state.plan = plan


def find_stage(state: State, stages: Sequence[Stage]) -> None:
    """Find the stage that a checkpoint was saved in, and write its index into the state.

    Raises UserError when the stage is gone, was planned otherwise, or has untrained stages before it.
    """
    if not state.planned:
        return
    names, new_name = [stage.name for stage in stages], "or take a new name=..."
    if state.stage_name not in names:
        raise UserError(
            f"the run stopped in stage {state.stage_name}, which the curriculum no longer has (stages: "
            f"{', '.join(names)}); put it back, {new_name} (configs/curriculum)"
        )
    index = names.index(state.stage_name)
    if planned(stages[index]) != state.planned:
        words = "seq_len={} batch={} steps={}"
        was, now = words.format(*state.planned), words.format(*planned(stages[index]))
        raise UserError(
            f"curriculum.stages.{state.stage_name} was planned with {was} and stopped at step {state.stage_step}; with "
            f"{now} its documents would be drawn anew and some read twice. Leave it as it was and add a stage after "
            f"it, {new_name} (configs/curriculum)"
        )
    untrained = [name for name in names[:index] if name not in state.trained]
    if untrained:
        raise UserError(
            f"the run stopped in stage {state.stage_name}, and {', '.join(untrained)} before it was never trained; "
            f"give it a place after {state.stage_name}, {new_name} (configs/curriculum)"
        )
    state.stage = index


def already_trained(run: Path, stages: Sequence[Stage]) -> bool:
    """Whether the run in a folder has trained all stages; checked before the record of this start is written there.

    Raises UserError as `find_stage` does, and where a run that has trained lacks the checkpoint to continue from.
    """
    folders = [runfolder.stage_folder(run, stage.name) for stage in stages]
    finished = [runfolder.is_finished(run, stage.name) for stage in stages]
    trained = all(finished) and runfolder.exported(folders[-1])
    newest = next(iter(runfolder.checkpoints(run)), None)
    state = stored_state(newest) if newest else None
    if state is not None:
        find_stage(state, stages)
    elif newest is None and not trained and (missing := _missing_checkpoint(run, any(finished))):
        raise UserError(
            f"{missing}, and the run in {run} cannot go on without its newest checkpoint: copy it there too, or take a "
            f"new name=... to start over{_from_model(run, stages)}"
        )
    ended = newest is None or (state is not None and state.ended and state.stage == len(stages) - 1)
    return trained and ended


def _missing_checkpoint(run: Path, finished: bool) -> str:
    """The words for a missing checkpoint; empty for a run that never had one."""
    pointer = run / "latest.json"
    if not pointer.exists():
        return f"{run / 'stages'} has a finished stage and no checkpoint" if finished else ""
    named = "a checkpoint"
    with suppress(UserError):  # a damaged pointer, too, is of a run that has had one
        named = read_record(pointer, "the name of the newest checkpoint", "", keys=("checkpoint",))["checkpoint"]
    return f"{pointer} names {named}, which is not there"


def _from_model(run: Path, stages: Sequence[Stage]) -> str:
    """How a new run trains the stages after the last one whose model is there, in words; "" where there is none."""
    models = [runfolder.stage_folder(run, stage.name) for stage in stages if runfolder.is_finished(run, stage.name)]
    whole = [folder for folder in models if runfolder.exported(folder)]
    names = [stage.name for stage in stages]
    left = names[names.index(whole[-1].name) + 1 :] if whole else []
    if not left:
        return ""
    return (f", or with model.path={whole[-1] / 'model'} 'curriculum.only=[{','.join(left)}]' to train only what is "
            "left, with fresh moments of the optimizer")  # fmt: skip


def left_words(run: Path, stages: Sequence[Stage]) -> str:
    """What of a run that fails now is left, and which command goes on, in words."""
    if runfolder.checkpoints(run):
        return runfolder.where(run)
    if way := _from_model(run, stages):
        return f"no checkpoint was written, so the same command cannot go on: take a new name=... to start over{way}"
    return "no checkpoint was written, so the same command starts over"


def say_resumed(state: State, stages: Sequence[Stage]) -> None:
    """Say at which step a run continues, if it has trained before."""
    if state.step:
        stage = stages[min(state.stage, len(stages) - 1)]
        ended = state.stage >= len(stages) or (stage is stages[-1] and state.ended)
        rest = "; every stage is trained" if ended else ""
        console.say(f"continuing at step {state.step} (stage {stage.name}, {state.tokens:,} tokens done{rest})")
