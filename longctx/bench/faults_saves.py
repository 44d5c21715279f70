"""Kills inside background saves: between the first copy to host memory and the rename of the pointer.

The step's line in metrics.jsonl, written just before the copy, shows where a save begins, and latest.json where it
ends. The runs are large enough for a save to last several steps. Kills that come after the end are not counted.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from longctx import console
from longctx.bench.faults_run import SAVE_EVERY, StartedRun
from longctx.bench.faults_soak import KINDS, Soak
from longctx.errors import RunFailed

POLL = 0.001  # seconds between two looks at the run's files
SHORT = ("copying", "publishing")  # parts of a save that random instants would hardly meet, so half are drawn from them
COPYING = 0.05  # of a save's seconds
PUBLISHING = 0.02  # seconds


@dataclass(frozen=True)
class Kill:
    """A kill of `kind` while the checkpoint of `step` was being saved, in this part of the save."""

    step: int
    kind: str
    part: str


def kill_in_saves(soak: Soak) -> dict[str, int]:
    """Kill runs inside saves, continue and finish them; returns the kills by part of the save.

    A continued run must go on from the last whole checkpoint. Raises RunFailed at the first wrong result.
    """
    longest = _undisturbed(soak)
    console.say(f"the longest save of the undisturbed run took {longest:.2f} s")
    parts: Counter[str] = Counter()
    soak.begin()
    saved = 0
    while soak.kills.total() < soak.config.kills_in_saves:
        life = _Life(soak)
        kill = _kill_inside_one(soak, life, longest)
        if kill is None:  # the run came to its end first
            _check_continued(soak.finish(life.started), saved)
            soak.begin()
            saved = 0
            continue
        _check_continued(life.started.log.read_text(encoding="utf-8"), saved)
        saved = _last_whole(soak.path)
        if life.started.saved_step() >= kill.step:
            continue  # the save had ended
        soak.kills[kill.kind] += 1
        parts[kill.part] += 1
        shown = f"{soak.kills.total()}/{soak.config.kills_in_saves}"
        console.say(f"kill in a save {shown}: {kill.kind} while {kill.part} step {kill.step}")
    _check_continued(soak.finish(soak.start()), saved)
    return dict(parts)


class _Life:
    """The current run, started once, and the background saves that its files show."""

    def __init__(self, soak: Soak) -> None:
        self._metrics = soak.path / "metrics.jsonl"
        self._known = self._stat()  # before the start: the lines of a killed process are not this one's
        half = soak.config.steps // 2  # at a stage's end training waits for the save
        self._due = [step for step in range(SAVE_EVERY, 2 * half, SAVE_EVERY) if step != half]
        self.started = soak.start()

    def next_save(self) -> int | None:
        """Wait until the run begins a save, and return its step; None where the run ends before."""
        while self.started.wait_for(POLL):
            if (now := self._stat()) == self._known:
                continue
            self._known, step = now, self.started.step()
            if step in self._due and self.started.saved_step() < step:
                return step
        return None

    def _stat(self) -> tuple[int, int]:
        try:
            found = self._metrics.stat()
        except FileNotFoundError:
            return 0, 0
        return found.st_ino, found.st_size


def _undisturbed(soak: Soak) -> float:
    """Let a run come to its end, keep its results, and return the seconds of its longest background save."""
    soak.begin("undisturbed_large")
    life, longest = _Life(soak), 0.0
    while (step := life.next_save()) is not None:
        began = time.monotonic()
        while life.started.saved_step() < step and life.started.wait_for(POLL):
            pass
        longest = max(longest, time.monotonic() - began)
    soak.keep_results(life.started)
    return longest


def _kill_inside_one(soak: Soak, life: _Life, longest: float) -> Kill | None:
    """Kill the run or a rank inside its first or second save; None where the run ends before."""
    passing, started = soak.rng.randint(0, 1), life.started
    while (step := life.next_save()) is not None:
        if passing:
            passing -= 1
            continue
        aim = soak.rng.choice(("anywhere", "anywhere", *SHORT))
        alive = _wait_inside(started, step, soak.rng, aim, longest)
        part = _part_of_save(started.run, step)
        if not alive or started.saved_step() >= step:
            continue
        kind = soak.rng.choice(KINDS) if soak.config.nproc > 1 else "everything"
        soak.kill(started, kind)
        return Kill(step, kind, part)
    return None


def _wait_inside(started: StartedRun, step: int, rng: random.Random, aim: str, longest: float) -> bool:
    """Wait for a random instant of a save or of one of its short parts; returns whether all ranks are alive.

    longest: the seconds of a whole save.
    """
    if aim == "publishing":
        while _part_of_save(started.run, step) in ("copying", "writing") and started.wait_for(POLL):
            pass
        return started.wait_for(rng.uniform(0.0, PUBLISHING))
    return started.wait_for(rng.uniform(0.0, longest if aim == "anywhere" else COPYING * longest))


def _part_of_save(run: Path, step: int) -> str:
    """The part of a save that the files show: copying (to host memory), writing, publishing, or the pointer."""
    folders, name = "stages/*/checkpoints", f"step{step:08d}"
    partial = next(run.glob(f"{folders}/.{name}.partial-*"), None)
    if partial is None:
        return "pointing" if any(run.glob(f"{folders}/{name}")) else "copying"
    return "publishing" if (partial / "state.json").exists() else "writing"


def _last_whole(run: Path) -> int:
    """The step of the newest checkpoint that is complete; it may wait for its pointer. 0 where there is none."""
    found = run.glob("stages/*/checkpoints/step*/manifest.json")
    return max((int(path.parent.name.removeprefix("step")) for path in found), default=0)


def _check_continued(text: str, saved: int) -> None:
    """Check that a run went on from the checkpoint of step `saved`. Raises RunFailed."""
    words = f"continuing at step {saved} " if saved else ""
    if words not in text or "damaged" in text or (not saved and "continuing" in text):
        raise RunFailed(
            f"a run whose last whole checkpoint is that of step {saved} did not continue from it: {text[-2000:]}"
        )
