"""Checkpoints that stay intact whenever a run is killed.

Each rank writes its fragments into a temporary folder and syncs them. Rank 0 adds the state and a manifest with every
file's sha256, renames the folder, and only then updates the pointer. A folder without a valid manifest is unfinished.
When a checkpoint is loaded, the ranks divide the files among them and check every hash; a damaged file is named, and
the previous checkpoint is used. A save that fails (a full disk) leaves the previous one intact, and training goes on.

Training stops only while weights and moments are copied to host memory, where that has room (`checkpoint.background`).
A thread of each rank writes the copy, and the checkpoint is published after the first step at which all ranks have
written. A crash before that leaves the last whole checkpoint.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterable
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from longctx import console
from longctx.errors import RunFailed, UserError
from longctx.fingerprint import file_sha256
from longctx.signals import beside, temporary
from longctx.storage.files import GIB, discard, size_words, sync, write_text
from longctx.train import fragments, runfolder
from longctx.train.checkpoint_files import FORMAT, damage, write_file
from longctx.train.snapshot import HostCopies, Work, copies_fit

if TYPE_CHECKING:
    from longctx.distributed.ranks import Ranks
    from longctx.train.engine import Engine
    from longctx.train.fragments import Fragment


@dataclass
class State:
    """The progress of a run.

    cursor: sequences of the current stage already used, whatever dp and cp were.
    stage: its index in the curriculum, which may change between two starts of a run; stage_name and planned (seq_len,
    batch, steps) identify it.
    plan: the fingerprint of the stage's sequences, into which the cursor points; "" in checkpoints of before it.
    trained: names of the stages that were trained to their end.
    ended: the current stage is trained to its end (perhaps early), and its export may still be due.
    recent_losses, spikes, mute: what the guards remember of the stage's last steps.
    tail_losses: over the last quarter of each sequence, of the stage's steps that were taken, where it may end early.
    """

    step: int = 0
    stage: int = 0
    stage_name: str = ""
    planned: list[int] = field(default_factory=list)
    plan: str = ""
    trained: list[str] = field(default_factory=list)
    stage_step: int = 0
    ended: bool = False
    cursor: int = 0
    tokens: int = 0
    seconds: float = 0.0
    stage_seconds: float = 0.0
    skipped: int = 0
    recent_losses: list[float] = field(default_factory=list)
    spikes: int = 0
    mute: int = 0
    tail_losses: list[float] = field(default_factory=list)
    written_by: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class _Save:
    """A checkpoint between its first file and its publication.

    state: the text of state.json. stack: removes the unpublished folder. work: writes this rank's file and returns its
    entry of the manifest, and the reason why there is none.
    """

    step: int
    partial: Path
    final: Path
    state: str
    shapes: dict[str, list[int]]
    stack: ExitStack
    work: Work


def stored_state(checkpoint: Path) -> State | None:
    """The progress that a checkpoint holds, unchecked; None where it cannot be read."""
    try:
        stored = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
        stored.pop("wandb_id", None)  # written by earlier versions
        return State(**stored)
    except (OSError, ValueError, TypeError, AttributeError):
        return None


class Checkpoints:
    """The checkpoints of one run: RUN/stages/NAME/checkpoints/step00000012, pointed to by RUN/latest.json."""

    def __init__(
        self, run: Path, ranks: Ranks, *, keep: int, spare_gib: float, background: bool | Literal["auto"] = False
    ) -> None:
        """background: whether `start` writes on a thread; auto: where host memory holds the copy."""
        self.run, self.ranks, self.keep, self.spare = run, ranks, keep, spare_gib * GIB
        self._size = 0.0
        self.seconds = 0.0  # that this rank needed to write the last one
        self._background = background
        self._copies = HostCopies(ranks.device)
        self._pending: _Save | None = None
        self._pruning: Work | None = None
        self._sound: Path | None = None  # the checkpoint that was published or restored last

    @property
    def pending(self) -> bool:
        """Whether a save has been started and not been settled; the same on every rank."""
        return self._pending is not None

    @property
    def writing(self) -> bool:
        """Whether this rank's thread still writes."""
        return self._pending is not None and self._pending.work.is_alive()

    def save(self, engine: Engine, state: State, stage: str) -> Path | None:
        """Write a checkpoint and return its folder; None, after a message, where that failed.

        A save that is still under way is settled first.
        """
        self.settle()
        found = self._begin(engine, state, stage, engine.fragments())
        if found is None:
            return None
        found.work.run()
        final = self._finish(found)
        if final is not None and self.ranks.first:
            self._prune(final)
        return final

    def start(self, engine: Engine, state: State, stage: str) -> Path | None:
        """Copy to host memory what the engine holds, and write it on a thread while training goes on.

        A save that is still under way is settled first: one is in flight at most. Returns the folder only where the
        checkpoint has been written at once; `settle` ends the others.
        """
        self.settle()
        if self._background == "auto":
            lacks = not copies_fit(engine.fragments(), self.ranks.local_world)
            self._background = not self.ranks.any(lacks)
        pieces = self._copied(engine) if self._background else None
        if pieces is None:
            return self.save(engine, state, stage)
        self._pending = self._begin(engine, state, stage, pieces)
        if self._pending is not None:
            self._pending.work.start()
        return None

    def _copied(self, engine: Engine) -> list[Fragment] | None:
        """Copies of what the engine holds, or None on all ranks where the host has no memory for those of one.

        A save must not end the run; later ones are then written at once, too.
        """
        pieces, problem = None, ""
        try:
            pieces = self._copies.take(engine.fragments())
        except MemoryError as error:
            problem = str(error) or "the host's memory is full"
        problems = [text for text in self.ranks.gather(problem) if text]
        if not problems:
            return pieces
        self._copies.free()
        self._background = False
        console.say(f"[yellow]saves wait for the disk from here on:[/] no copy in host memory ({problems[0]})")
        return None

    def settle(self) -> int | None:
        """Wait for the save under way on all ranks and publish it; returns its step where that succeeded.

        A collective: every rank calls it at the same place of the run.
        """
        if self._pending is None:
            return None
        found, self._pending = self._pending, None
        if (final := self._finish(found)) is None:
            return None
        if self.ranks.first:
            self._pruning = Work(lambda: self._prune(final))  # removing gigabytes takes a while
            self._pruning.start()
        return found.step

    def abandon(self) -> None:
        """At a run's end: give up a save that is still under way and remove what it wrote; the last one is intact."""
        if self._pending is not None:
            found, self._pending = self._pending, None
            with found.stack:
                found.work.outcome()
        if self._pruning is not None:
            self._pruning.outcome()

    def _begin(self, engine: Engine, state: State, stage: str, pieces: Iterable[Fragment]) -> _Save | None:
        """Make the folder that all ranks write into, and bind this rank's part of the work; None without room."""
        final = runfolder.stage_folder(self.run, stage) / "checkpoints" / f"step{state.step:08d}"
        stack = ExitStack()
        own = stack.enter_context(temporary(beside(final)))
        partial, problem = self.ranks.broadcast((own, self._make_room(own, engine)))  # rank 0's folder
        if problem:
            stack.close()
            console.say(f"[yellow]checkpoint at step {state.step} not written:[/] {problem}")
            return None
        path = partial / f"rank{self.ranks.rank:05d}.safetensors"
        random = _random_states(self.ranks.device)
        work = Work(lambda: write_file(path, pieces, random))
        return _Save(state.step, partial, final, json.dumps(asdict(state), indent=1), engine.shapes(), stack, work)

    def _finish(self, found: _Save) -> Path | None:
        """Publish what all ranks have written; None, after a message, where one of them failed."""
        with found.stack:
            written = found.work.outcome()
            self.seconds = found.work.seconds
            reports = self.ranks.gather(written)
            failures = [f"rank {rank}: {text}" for rank, (_, text) in enumerate(reports) if text]
            if not failures and self.ranks.first:
                files = {f"rank{rank:05d}.safetensors": report for rank, (report, _) in enumerate(reports)}
                failures = self._publish(found, files)
            failures = self.ranks.broadcast(failures)
        if failures:
            console.say(f"[yellow]checkpoint at step {found.step} failed, the previous one is intact:[/] {failures[0]}")
            return None
        self._sound = found.final
        return found.final

    def _make_room(self, partial: Path, engine: Engine) -> str | None:
        """Rank 0 makes the folder and checks the free disk space; returns the obstacle in words, or None.

        Where room is lacking, damaged checkpoints go before the save, and so do those beyond `keep`, which may be lower
        than at an earlier start: otherwise they would go after it, and no save would ever find room.
        """
        if not self.ranks.first:
            return None
        if self._pruning is not None:
            self._pruning.outcome()
        try:
            partial.mkdir(parents=True)
            self._size = self._size or 12.0 * sum(math.prod(shape) for shape in engine.shapes().values())
            needed = self._size + self.spare
            if shutil.disk_usage(partial).free < needed:
                self._prune(self._sound, damaged=True)
            free = shutil.disk_usage(partial).free
        except OSError as error:
            return f"{partial}: {error.strerror}"
        if free < needed:
            fewer = f", or continue with less than checkpoint.keep={self.keep}" if self.keep > 1 else ""
            return (
                f"{size_words(free)} free under {self.run}, {size_words(needed)} needed (checkpoint.spare_gib is part "
                f"of it); free some space{fewer}"
            )
        return None

    def _publish(self, found: _Save, files: dict[str, Any]) -> list[str]:
        partial, final = found.partial, found.final
        try:
            write_text(partial / "state.json", found.state)
            if (self.run / "config.yaml").exists():
                write_text(partial / "config.yaml", (self.run / "config.yaml").read_text(encoding="utf-8"))
            self._size = float(sum(entry["bytes"] for entry in files.values()))
            manifest = {"format": FORMAT, "parameters": found.shapes, "files": files,
                        "state_sha256": file_sha256(partial / "state.json")}  # fmt: skip
            write_text(partial / "manifest.json", json.dumps(manifest))
            sync(partial)
            if final.exists():  # the run has been continued from an older checkpoint
                discard(final)
            os.rename(partial, final)
            sync(final.parent)
            write_text(self.run / "latest.json", json.dumps({"checkpoint": str(final.relative_to(self.run))}))
        except OSError as error:
            return [f"rank 0: {error}"]
        return []

    def _prune(self, sound: Path | None, *, damaged: bool = False) -> None:
        """Remove all but the newest `keep` checkpoints; sound: the one that was published or restored last.

        Those of later steps do not count: they are damaged, since the run was continued from before them. damaged: they
        go as well.
        """
        found = runfolder.checkpoints(self.run)
        own = [path for path in found if sound is None or path.name <= sound.name]
        for path in [*own[self.keep :], *(found[: len(found) - len(own)] if damaged else ())]:
            with suppress(OSError):
                discard(path)

    def load(self, engine: Engine) -> State | None:
        """Restore the newest intact checkpoint into the engine; None when the run has none yet.

        Raises RunFailed when checkpoints exist and none is intact, UserError when they hold another model.
        """
        own, share = runfolder.checkpoints(self.run) if self.ranks.first else [], (self.ranks.rank, self.ranks.world)
        candidates = [str(path) for path in self.ranks.broadcast(own)]
        for folder in map(Path, candidates):
            problems = [text for found in self.ranks.gather(list(damage(folder, *share))) for text in found]
            if problems:
                console.say(f"[yellow]checkpoint {folder} is damaged:[/] {problems[0]}; the previous one is used")
                continue
            return self._restore(folder, engine)
        if candidates:
            raise RunFailed(
                f"none of the {len(candidates)} checkpoints under {self.run} is intact; "
                "take a new name=... to start over, or restore the folder from a copy"
            )
        return None

    def _restore(self, folder: Path, engine: Engine) -> State:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        check_same_model(manifest["parameters"], engine.shapes(), folder)
        state = stored_state(folder)
        if state is None:  # its hash is right
            raise RunFailed(
                f"{folder / 'state.json'} was written by another version of longctx; continue with that one"
            )
        with fragments.FragmentReader(folder, manifest) as reader:
            engine.restore(reader)
            same_world = state.written_by.get("world") == self.ranks.world
            own = f"rank{self.ranks.rank:05d}.safetensors"
            rng, on_device = (reader.extra(own, name) if same_world else None for name in ("rng", "cuda_rng"))
        if rng is not None:
            torch.set_rng_state(rng)
        if on_device is not None and self.ranks.device.type == "cuda":
            torch.cuda.set_rng_state(on_device, self.ranks.device)
        self._sound = folder
        return state


def _random_states(device: torch.device) -> dict[str, torch.Tensor]:
    states = {"rng": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda_rng"] = torch.cuda.get_rng_state(device)
    return states


def check_same_model(stored: dict[str, list[int]], own: dict[str, list[int]], folder: Path) -> None:
    """Raise UserError where a checkpoint's trainable parameters differ from this model's."""
    wrong = [name for name in own if stored.get(name) != own[name]] + [name for name in stored if name not in own]
    if wrong:
        name = wrong[0]
        raise UserError(
            f"{folder} is a checkpoint of another model: {name} is {stored.get(name, 'absent')} there and "
            f"{own.get(name, 'absent or frozen')} here ({len(wrong)} parameters differ); "
            "set model.path and optim.freeze as they were, or take a new name=..."
        )
