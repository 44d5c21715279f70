"""Where words go: results to standard output, everything else (logs, bars, warnings) to standard error.

`format=json` can then be piped without filtering, and ranks other than 0 stay silent.
"""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

_quiet = False
_remarked: set[str] = set()


def console() -> Console:
    """A rich console on standard error."""
    from rich.console import Console

    return Console(stderr=True, quiet=_quiet, highlight=False, soft_wrap=True)


def silence() -> None:
    """Make this process (a rank other than 0) print nothing but errors from here on."""
    global _quiet
    _quiet = True


def say(*words: object) -> None:
    """One line on standard error; rich markup such as [bold] is understood."""
    if not _quiet:
        console().print(*words)


def warn(text: str) -> None:
    """A warning on standard error, also from silent ranks."""
    print(f"longctx: warning: {text}", file=sys.stderr, flush=True)


def remark(text: str) -> None:
    """A warning that every rank and every opening would give alike: once per process, and not from silent ranks."""
    if not _quiet and text not in _remarked:
        _remarked.add(text)
        warn(text)


def emit_json(document: Any) -> None:
    """The one JSON document of a `format=json` call, on standard output."""
    json.dump(document, sys.stdout, indent=2, default=str)
    sys.stdout.write("\n")
    sys.stdout.flush()


def emit(renderable: object) -> None:
    """A result for people (text or a rich table), on standard output."""
    from rich.console import Console

    if not _quiet:
        Console(highlight=False, soft_wrap=True).print(renderable)


def progress(**columns: Any) -> Progress:
    """A rich progress display on standard error; use as a context manager."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    return Progress(
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console(),
        disable=_quiet,
        **columns,
    )
