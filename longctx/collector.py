"""Python's garbage collector while libraries are imported.

torch and transformers make 400,000 objects that stay. Walking through them again and again takes 0.9 s of the 5 s of
processor time that importing both needs (0.15 s with this module), and later of every full collection.
"""

from __future__ import annotations

import gc

_before: tuple[int, int, int] | None = None


def begin_imports() -> None:
    """Let a process of our own collect seldom until `end_imports`."""
    global _before
    _before = _before or gc.get_threshold()
    gc.set_threshold(200_000, *_before[1:])


def end_imports() -> None:
    """Collect as before, and never what has been imported; does nothing unless `begin_imports` was called."""
    global _before
    if _before is not None:
        gc.freeze()
        gc.set_threshold(*_before)
        _before = None
