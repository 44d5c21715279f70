"""Host memory: makes glibc return the memory of freed tensors to the system.

glibc raises its mmap threshold to the largest block ever freed (up to 32 MiB). From then on it places activations of
that size in its heap, between longer-lived blocks, and the process keeps memory that it no longer needs.
"""

from __future__ import annotations

import ctypes
import sys

_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD = -3, -1
_THRESHOLD = 4 << 20


def return_freed_memory() -> None:
    """Make this process map blocks of 4 MiB and more separately from now on; does nothing without glibc."""
    if not sys.platform.startswith("linux"):
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_MMAP_THRESHOLD, _THRESHOLD)
        libc.mallopt(_M_TRIM_THRESHOLD, _THRESHOLD)
