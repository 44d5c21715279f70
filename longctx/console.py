"""Output on the screen: results go to standard output; logs, progress bars and warnings go to standard error.

So the output of `format=json` can be piped without a filter. Ranks other than 0 print only warnings.
"""

from __future__ import annotations

import json
import os
import re
import sys
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

_NO_STYLE = re.compile(r"\[(?!(?:bold|yellow|/|/bold|/yellow)\])")
_quiet = False
_remarked: set[str] = set()
_document: TextIO | None = None  # standard output, where it is kept for the document


def console() -> Console:
    """Return a rich console on standard error."""
    from rich.console import Console

    return Console(stderr=True, quiet=_quiet, highlight=False, soft_wrap=True)


def silence() -> None:
    """Silence this process, a rank other than 0: from now on it prints only warnings and errors."""
    global _quiet
    _quiet = True


def styled(text: str) -> str:
    """Return a text of which rich takes [bold], [yellow] and their ends for markup, and prints every other bracket.

    Paths and the words of errors have brackets too, which rich would leave out or fail on.
    """
    return _NO_STYLE.sub(r"\\[", text)


def say(text: str) -> None:
    """Print one line on standard error, in which [bold] and [yellow] are applied, see `styled`."""
    if not _quiet:
        console().print(styled(text))


def last_line(text: str) -> None:
    """Print the line with which a run ends or starts its ranks again; it opens with longctx's name, as errors do."""
    say(f"longctx: {text}")


def escape(text: str) -> str:
    """Return a text that `emit` prints as it is, brackets included."""
    from rich.markup import escape as escaped

    return escaped(text)


def warn(text: str) -> None:
    """Print a warning on standard error, even on a silenced rank."""
    print(f"longctx: warning: {text}", file=sys.stderr, flush=True)


def remark(text: str) -> None:
    """Print a warning once per process, and not on a silenced rank; for warnings that every rank would repeat."""
    if not _quiet and text not in _remarked:
        _remarked.add(text)
        warn(text)


def keep_for_the_document() -> None:
    """Keep standard output for `emit_json` and `emit_text`, and send this process's other output to standard error.

    Libraries print there too, such as DeepSpeed's log.
    """
    global _document
    sys.stdout.flush()
    _document = os.fdopen(os.dup(1), "w", encoding=sys.stdout.encoding, errors=sys.stdout.errors)
    os.dup2(2, 1)


def emit_json(document: Any) -> None:
    """Print the JSON document of a command with `format=json` on standard output."""
    emit_text(json.dumps(document, indent=2, default=str) + "\n")


def emit_text(text: str) -> None:
    """Write a text that other programs read on standard output."""
    out = _document or sys.stdout
    out.write(text)
    out.flush()


def emit(renderable: object) -> None:
    """Print a result for people, text or a rich table, on standard output; a table may be wider than the screen."""
    from rich.console import Console
    from rich.table import Table

    if _quiet:
        return
    console = Console(highlight=False, soft_wrap=True)
    if isinstance(renderable, Table):
        for column in renderable.columns:  # rich would cut numbers off to make a table fit
            sizes = [console.measure(cell) for cell in (column.header, *column.cells)]
            column.min_width = max(size.maximum if column.no_wrap else size.minimum for size in sizes)
    console.print(renderable)


def progress(*, shown: bool = True) -> Progress:
    """Return a rich progress display on standard error, to be used as a context manager; shown=False prints nothing."""
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
        disable=_quiet or not shown,
    )
