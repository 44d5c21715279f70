"""A part of `launch/gpu_check.sh` and a row of its table."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]


class Row(NamedTuple):
    """A line of the table. holds: whether the floor is reached, None for a figure without one. seconds: of the part."""

    part: str
    figure: str
    value: float | str | None = None
    unit: str = ""
    floor: str = ""
    peer: str = ""
    holds: bool | None = None
    skipped: str = ""
    note: str = ""
    seconds: float | None = None

    def shown(self) -> str:
        """The value with its unit, in four figures."""
        value = f"{self.value:.4g}" if isinstance(self.value, float) else str(self.value or "")
        return f"{value} {self.unit}".strip()


class Part(NamedTuple):
    """A command with its time limit. least: seconds that must be left to start it. needs: importable packages.

    lacks: gives another reason why the part cannot run, or an empty text.
    """

    name: str
    group: str
    help: str
    seconds: int
    least: int
    command: Callable[[Path], list[str]]
    read: Callable[[Path], list[Row]]
    needs: tuple[str, ...] = ()
    lacks: Callable[[], str] = lambda: ""
