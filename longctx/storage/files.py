"""Writes files and folders that appear only when complete, and syncs them before anything can refer to them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from longctx.signals import beside, temporary


def sync(path: Path) -> None:
    """fsync a file's bytes, or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a hidden path to write to; it is renamed to `path` if the block succeeds and removed if it fails.

    A reader sees the old file or the new one. A folder can replace only an empty folder.
    """
    with temporary(beside(path)) as partial:
        yield partial
        sync(partial)
        os.replace(partial, path)
        sync(path.parent)


def discard(path: Path) -> None:
    """Remove a file or folder in one step: a reader sees all of it or nothing."""
    with temporary(beside(path.with_name(f"{path.stem}-old{path.suffix}"))) as old:
        os.replace(path, old)


def write_text(path: Path, text: str) -> None:
    """Write a small text file through `replacing`."""
    with replacing(path) as partial:
        partial.write_text(text)


def write_json(path: Path, document: Any) -> None:
    """Write a small JSON file through `replacing`."""
    write_text(path, json.dumps(document, indent=2) + "\n")


def save_figure(figure: Any, path: Path, *, dpi: int) -> None:
    """Save a matplotlib figure in the format of the name's suffix, or as PNG without one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        figure.savefig(partial, dpi=dpi, format=path.suffix.removeprefix(".") or "png")
