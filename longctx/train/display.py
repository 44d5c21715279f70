"""The progress of a training run on the screen: one bar per stage, or plain lines.

Both show loss, tokens per second and the time left. Rank 0 writes them to standard error. `auto` draws bars on a
terminal and prints lines elsewhere.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from longctx import console

if TYPE_CHECKING:
    from longctx.curriculum import Stage

REFRESH_SECONDS = 0.5


class Display:
    """A context manager that shows each step; it redraws at most twice a second."""

    def __init__(self, mode: str, every: int, stages: Sequence[Stage], *, first: bool) -> None:
        wanted = mode if mode != "auto" else ("rich" if sys.stderr.isatty() else "plain")
        self.mode, self.every, self.stages = wanted if first else "none", every, stages
        self._bars: Any = None
        self._tasks: dict[str, Any] = {}
        self._shown = 0.0
        self._rate: float | None = None

    def __enter__(self) -> Display:
        if self.mode == "rich":
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

            text = ("loss {task.fields[loss]}", "{task.fields[rate]} tokens/s", "left {task.fields[left]}")
            columns = [TextColumn("[bold]{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn()]
            self._bars = Progress(
                *columns, *(TextColumn(item) for item in text), TimeElapsedColumn(),
                console=console.console(), auto_refresh=False,
            )  # fmt: skip
            self._bars.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._bars:
            self._bars.refresh()
            self._bars.stop()

    def stage(self, stage: Stage, done: int, words: str) -> None:
        """Show that a stage begins, or continues after `done` steps."""
        self._rate = None
        if self._bars:
            self._tasks[stage.name] = self._bars.add_task(
                stage.name, total=stage.steps, completed=done, loss="-", rate="-", left="-"
            )
        if self.mode != "none":
            self.say(f"[bold]{stage.name}[/]: {words}")

    def step(self, stage: Stage, done: int, line: Mapping[str, Any]) -> None:
        seconds = line["seconds"]["step"]
        self._rate = seconds if self._rate is None else 0.9 * self._rate + 0.1 * seconds
        now = time.monotonic()
        if self.mode == "plain" and (done % self.every == 0 or done == stage.steps):
            self.say(f"{stage.name} {done}/{stage.steps}  " + self._words(stage, done, line))
        elif self._bars and (now - self._shown > REFRESH_SECONDS or done == stage.steps):
            self._shown = now
            self._bars.update(
                self._tasks[stage.name], completed=done, loss=_loss(line),
                rate=f"{line['tokens_per_second']:,.0f}", left=_clock((self._rate or 0.0) * (stage.steps - done)),
            )  # fmt: skip
            self._bars.refresh()

    def say(self, text: str) -> None:
        if self._bars:
            self._bars.console.print(console.styled(text))
        elif self.mode != "none":
            console.say(text)

    def _words(self, stage: Stage, done: int, line: Mapping[str, Any]) -> str:
        left = _clock((self._rate or 0.0) * (stage.steps - done))
        return (f"loss {_loss(line)}  norm {line['grad_norm']:.3f}  lr {line['lr']:.2e}  "
                f"{line['tokens_per_second']:,.0f} tokens/s  left {left}")  # fmt: skip


def _loss(line: Mapping[str, Any]) -> str:
    return "-" if line["loss"] is None else f"{line['loss']:.4f}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
