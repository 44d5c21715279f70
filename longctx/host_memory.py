"""The memory of this machine that a process may use: a control group may allow less than there is."""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

_OWN = Path("/proc/self/cgroup")  # the control groups of this process, a line each: number:controllers:path
_ROOT = Path("/sys/fs/cgroup")


class _Names(NamedTuple):
    """The files of a group's limit and of its use, and its caches' line of memory.stat, which it would give back."""

    limit: str
    used: str
    caches: str


_VERSION_1 = _Names("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_VERSION_2 = _Names("memory.max", "memory.current", "inactive_file")


def host_memory() -> float:
    """Bytes of this machine's memory, or the limit of this process's control group if that is less."""
    return min([_page("SC_PHYS_PAGES"), *(limit for limit, _ in _limits())])


def free_memory() -> float:
    """Bytes that the kernel would give without swapping, or that the control group still allows if that is less."""
    free = _page("SC_AVPHYS_PAGES")
    for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("MemAvailable:"):  # counts what caches would give back
            free = 1024.0 * int(line.split()[1])
    return min([free, *(limit - used for limit, used in _limits())])


def peak_resident() -> float:
    """Bytes of the largest resident set that this program has had.

    On Linux getrusage would also count that of the process that started it, which stays in force over exec.
    """
    unit = 1 if sys.platform == "darwin" else 1024
    return process_bytes("VmHWM") or float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)


def process_bytes(name: str, process: int | str = "self") -> float:
    """Bytes that Linux counts for a process: VmRSS is its resident set, VmHWM the largest since it began.

    0 for a process that has ended, and on other systems. Writing 5 to its clear_refs lets VmHWM begin anew.
    """
    try:
        lines = Path(f"/proc/{process}/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0.0
    return next((1024.0 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:")), 0.0)


def killed_for_memory() -> int | None:
    """The number of processes that this kernel has killed for lack of memory; None where it does not count them."""
    try:
        lines = Path("/proc/vmstat").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), None)


def _page(name: str) -> float:
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf(name))


def _limits() -> list[tuple[float, float]]:
    """The limit and the use, without caches, of each control group that this process is in and that has a limit."""
    found = []
    for folder, names in _groups():
        try:
            most, now = (float((folder / name).read_text(encoding="utf-8")) for name in names[:2])
        except (OSError, ValueError):  # not there, or "max"
            continue
        found.append((most, now - _caches(folder / "memory.stat", names.caches)))
    return found


def _caches(file: Path, name: str) -> float:
    """The bytes of a group's caches, 0 where its memory.stat does not tell."""
    try:
        told = dict(line.split() for line in file.read_text(encoding="utf-8").splitlines())
        return float(told.get(name, 0))
    except (OSError, ValueError):
        return 0.0


def _groups() -> Iterator[tuple[Path, _Names]]:
    """The folders of this process's control groups of memory, and of the groups above them, whose limits hold too.

    In a container the path may be that of the host, where only the topmost folder is there.
    """
    try:
        lines = _OWN.read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root, names = (_ROOT / "memory", _VERSION_1) if controllers else (_ROOT, _VERSION_2)
        group = PurePosixPath(path)
        for one in (group, *group.parents):
            yield root / one.relative_to("/"), names
