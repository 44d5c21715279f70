"""Every trial of a search as one line of JSON, written as it ends, so that an interrupted search goes on.

A line belongs to the search whose key it carries: a hash of all that makes two losses comparable. A last line
that was cut off is dropped, with a word about it.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from longctx.console import say


@dataclass(frozen=True)
class Trial:
    """One theta tried: loss of the window's last quarter and of the needles' answers, in nats per token."""

    theta: int
    last_quarter_loss: float
    needle_loss: float | None
    phase: str
    seconds: float

    def score(self, needle_weight: float) -> float:
        """What the search lowers."""
        return self.last_quarter_loss + needle_weight * (self.needle_loss or 0.0)


class TrialFile:
    """trials.jsonl of one search; `done` holds its finished trials by theta."""

    def __init__(self, path: Path, key: str) -> None:
        self.path, self.key = path, key
        self.done: dict[int, Trial] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            self._read()

    def _read(self) -> None:
        content = self.path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        others = 0
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                values = json.loads(line)
                mine = values.pop("key") == self.key
                trial = Trial(**values)
            except (json.JSONDecodeError, UnicodeDecodeError, TypeError, KeyError, AttributeError):
                say(f"{self.path}: line {number} is no trial and is passed over")
                continue
            if mine:
                self.done[trial.theta] = trial
            others += not mine
        if len(whole) != len(content):
            say(f"{self.path}: the last line was cut off; going on after the {len(self.done)} whole ones")
            with self.path.open("r+b") as stream:
                stream.truncate(len(whole))
        if others:
            say(f"{self.path}: {others} trials of another model, stage or setting are passed over")

    def add(self, trial: Trial) -> None:
        """Append a trial; it is on the disk when this returns."""
        with self.path.open("a") as stream:
            stream.write(json.dumps({"key": self.key, **asdict(trial)}) + "\n")
            stream.flush()
            os.fsync(stream.fileno())
        self.done[trial.theta] = trial
