"""Host memory: give freed tensors back to the system instead of letting glibc's heap grow around them.

glibc raises its mmap threshold to the largest block ever freed (up to 32 MiB), after which activations of
that size live in its heap, between longer-lived ones, and the process keeps what it no longer needs.
"""

from __future__ import annotations

import ctypes
import sys

_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD = -3, -1
_THRESHOLD = 4 << 20


def return_freed_memory() -> None:
    """Map blocks of 4 MiB and more separately from now on, in this process; only glibc knows how."""
    if not sys.platform.startswith("linux"):
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_MMAP_THRESHOLD, _THRESHOLD)
        libc.mallopt(_M_TRIM_THRESHOLD, _THRESHOLD)
