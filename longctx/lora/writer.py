"""Output folders that appear under their name only when complete."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from longctx.errors import UserError
from longctx.storage.files import sync


@contextmanager
def output_folder(out: str, *, needed: int) -> Iterator[Path]:
    """A folder to write into that is renamed to `out` when the block ends well and removed when it does not.

    needed: bytes that will be written; checked against the disk before anything is.
    Raises UserError when `out` exists or the disk is too small.
    """
    final = Path(out)
    if final.exists():
        raise UserError(f"out={out} exists already; name another folder or remove it (nothing was written)")
    parent = final.absolute().parent
    above = next(folder for folder in [parent, *parent.parents] if folder.exists())
    free = shutil.disk_usage(above).free
    if needed > free:
        raise UserError(
            f"out={out} needs {needed / 1e6:,.1f} MB and the disk of {above} has {free / 1e6:,.1f} MB free; "
            "free some space or name a folder on another disk (nothing was written)"
        )
    parent.mkdir(parents=True, exist_ok=True)
    partial = parent / f".{final.name}.partial-{os.getpid()}"
    partial.mkdir()
    try:
        yield partial
        sync(partial)
        os.rename(partial, final)
        sync(parent)
    finally:
        if partial.exists():
            shutil.rmtree(partial)
