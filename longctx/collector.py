"""Python's garbage collector while libraries are imported.

torch and transformers make millions of objects that stay. Walking through them again and again takes a tenth of the
time of importing them, and later of every full collection.
"""

from __future__ import annotations

import gc

_before: tuple[int, int, int] | None = None


def begin_imports() -> None:
    """Let a process of our own collect seldom until `end_imports`."""
    global _before
    _before = _before or gc.get_threshold()
    gc.set_threshold(50_000, *_before[1:])


def end_imports() -> None:
    """Collect as before, and never what has been imported; does nothing unless `begin_imports` was called."""
    global _before
    if _before is not None:
        gc.freeze()
        gc.set_threshold(*_before)
        _before = None
