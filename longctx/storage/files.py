"""Files and folders that appear whole, on the disk before something else may point at them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from longctx.signals import beside, temporary


def sync(path: Path) -> None:
    """Have a file's bytes, or the names in a folder, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A hidden path to write to, renamed to `path` when the block ends well and removed when it does not.

    A reader sees the old file or the new one. A folder takes the place of nothing or of an empty folder only.
    """
    with temporary(beside(path)) as partial:
        yield partial
        sync(partial)
        os.replace(partial, path)
        sync(path.parent)


def discard(path: Path) -> None:
    """Remove a file or folder: a reader sees all of it or nothing."""
    with temporary(beside(path.with_name(f"{path.stem}-old{path.suffix}"))) as old:
        os.replace(path, old)


def write_text(path: Path, text: str) -> None:
    """Replace a small file."""
    with replacing(path) as partial:
        partial.write_text(text)


def write_json(path: Path, document: Any) -> None:
    """Replace a small JSON file."""
    write_text(path, json.dumps(document, indent=2) + "\n")


def save_figure(figure: Any, path: Path, *, dpi: int) -> None:
    """A matplotlib figure in the format that the name's suffix says, PNG without one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        figure.savefig(partial, dpi=dpi, format=path.suffix.removeprefix(".") or "png")
