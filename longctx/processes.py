"""Processes that must not outlive the one that started them."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from typing import Any

from longctx import console


def die_with_parent(parent: Any = None) -> None:
    """Linux: have the kernel kill this process when its parent dies, however that dies.

    parent: the parent as multiprocessing knows it, for a process that may have lost it before it came here.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG
    if parent is not None and parent.pid != os.getppid():
        os._exit(1)


def warn_if_crowded(key: str, count: int) -> None:
    """Warn when `key` asks for more processes than this process has cores."""
    cores = len(os.sched_getaffinity(0))
    if count > cores:
        console.remark(
            f"{key}={count} processes share {cores} core{'s' * (cores > 1)}: they take turns, and each needs memory of "
            f"its own; {key}={cores} is faster unless they mostly wait for GPUs"
        )
