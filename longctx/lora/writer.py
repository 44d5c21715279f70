"""Creates output folders that appear under their name only when they are complete."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from longctx.errors import UserError
from longctx.storage.files import nearest_existing, replacing


@contextmanager
def output_folder(out: str, *, needed: int) -> Iterator[Path]:
    """Yield a folder to write into; it is renamed to `out` if the block succeeds and removed if it fails.

    needed: bytes that will be written. Raises UserError, before anything is written, when `out` exists or the disk is
    too small.
    """
    final = Path(out)
    if final.exists():
        raise UserError(f"out={out} exists already; name another folder or remove it (nothing was written)")
    parent = final.absolute().parent
    above = nearest_existing(parent)
    free = shutil.disk_usage(above).free
    if needed > free:
        raise UserError(
            f"out={out} needs {needed / 1e6:,.1f} MB and the disk of {above} has {free / 1e6:,.1f} MB free; free some "
            "space or name a folder on another disk (nothing was written)"
        )
    parent.mkdir(parents=True, exist_ok=True)
    with replacing(final) as partial:
        partial.mkdir()
        yield partial
