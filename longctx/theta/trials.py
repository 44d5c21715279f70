"""The trials of a search, one line of JSON each, written when a trial ends so that an interrupted search continues.

Each line holds the fingerprint of its search; trials with another fingerprint are ignored. An incomplete last line is
removed, with a message.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from longctx.console import say


@dataclass(frozen=True)
class Trial:
    """One trial of a theta: the loss on the texts' last quarter and on needle answers, in nats per token."""

    theta: int
    last_quarter_loss: float
    needle_loss: float | None
    phase: str
    seconds: float

    def score(self, needle_weight: float) -> float:
        """Return the score that the search minimizes."""
        return self.last_quarter_loss + needle_weight * (self.needle_loss or 0.0)


class TrialFile:
    """The trials file of one search; `done` holds the finished trials by theta."""

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
                say(f"{self.path}: line {number} is no trial and is ignored")
                continue
            if mine:
                self.done[trial.theta] = trial
            others += not mine
        if len(whole) != len(content):
            say(f"{self.path}: the last line is incomplete; continuing after {len(self.done)} complete ones")
            with self.path.open("r+b") as stream:
                stream.truncate(len(whole))
        if others:
            say(f"{self.path}: {others} trials of another model, text, stage or setting are ignored")

    def add(self, trial: Trial) -> None:
        """Append a trial and sync it to the disk."""
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({"key": self.key, **asdict(trial)}) + "\n")
            stream.flush()
            os.fsync(stream.fileno())
        self.done[trial.theta] = trial
