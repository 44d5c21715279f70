"""Child processes: tie their lives to this process, list them, end them, and see which signals they handle."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import longctx
from longctx import console
from longctx.errors import UserError

END_SECONDS = 5.0  # the kernel's time to end killed processes
RANKS_PER_CORE = 8  # each imports torch and has threads of its own


def die_with_parent(parent: int | None = None) -> None:
    """Let the kernel kill this process when its parent dies, on Linux.

    parent: the parent's pid. A process whose parent died before this call ends at once.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG
    if parent is not None and parent != os.getppid():
        os._exit(1)


def module_command(module: str, *words: str) -> tuple[list[str], dict[str, str]]:
    """The command and environment of a process that runs a module of this longctx with this interpreter.

    Unlike multiprocessing's spawn it does not import the caller's __main__, so it works from a script without a
    `__main__` guard, from a notebook and from standard input.
    """
    root = str(Path(longctx.__file__).parents[1])
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    return [sys.executable, "-m", module, *words], {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def children(pid: int | None = None) -> list[int]:
    """The pids of the processes that any thread of `pid` (default: this process) has started. Linux only."""
    found: list[int] = []
    for task in Path(f"/proc/{pid or os.getpid()}/task").glob("*"):
        try:
            found += [int(child) for child in (task / "children").read_text(encoding="utf-8").split()]
        except OSError:  # the thread or the process has ended
            continue
    return found


def descendants() -> list[int]:
    """The pids of all processes below this one: children, their children and so on."""
    found = children()
    for pid in found:  # grows while it is read
        found += children(pid)
    return found


def alive(pid: int) -> bool:
    """Whether a process exists and is not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text("utf-8", "replace").rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


def started(pid: int) -> float:
    """The time at which a process began, in seconds since the epoch, within about a second; infinite without one."""
    try:
        ticks = Path(f"/proc/{pid}/stat").read_text("utf-8", "replace").rsplit(")", 1)[1].split()[19]
        boot = next(line for line in Path("/proc/stat").read_text("utf-8").splitlines() if line.startswith("btime "))
        return int(boot.split()[1]) + int(ticks) / os.sysconf("SC_CLK_TCK")
    except (OSError, StopIteration):
        return float("inf")


def handles(pid: int, number: int) -> bool:
    """Whether a process has a handler for a signal; without one, most signals end it. True where this is unknown."""
    try:
        status = Path(f"/proc/{pid}/status").read_text("utf-8", "replace")
    except OSError:
        return sys.platform != "linux"
    masks = [line.split()[1] for line in status.splitlines() if line.startswith("SigCgt:")]
    return not masks or bool(int(masks[0], 16) >> (number - 1) & 1)


def send(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


def how_ended(status: int) -> str:
    """A process's end in words; status: as subprocess gives it, -N where signal N ended it."""
    return f"was ended by {signal.Signals(-status).name}" if status < 0 else f"failed (status {status})"


def kill(pids: Sequence[int]) -> None:
    """Kill these processes and wait until they are gone."""
    for pid in pids:
        send(pid, signal.SIGKILL)
    end = time.monotonic() + END_SECONDS
    while any(alive(pid) for pid in pids) and time.monotonic() < end:
        time.sleep(0.005)


def kill_descendants() -> list[int]:
    """Kill all processes below this one, and return their pids."""
    ended: list[int] = []
    while running := [pid for pid in descendants() if pid not in ended]:  # one may just have started another
        kill(running)
        ended += running
    return ended


def warn_if_crowded(key: str, count: int) -> None:
    """Warn when `key` asks for more processes than this process has cores."""
    cores = len(os.sched_getaffinity(0))
    if count > cores:
        console.remark(
            f"{key}={count} processes share {cores} core{'s' * (cores > 1)}: they take turns, and each needs memory of "
            f"its own; {key}={cores} is faster unless they mostly wait for GPUs"
        )


def check_crowd(key: str, count: int) -> None:
    """Raise UserError where `key` asks for so many ranks per core that they would not even start in minutes."""
    cores = len(os.sched_getaffinity(0))
    if count > RANKS_PER_CORE * cores:
        raise UserError(
            f"{key}={count} would start {count} processes on {cores} core{'s' * (cores > 1)}, and at most "
            f"{RANKS_PER_CORE} share a core; take {key}={cores}, or more machines (docs/launching.md)"
        )
