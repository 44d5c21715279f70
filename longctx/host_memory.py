"""The memory of this machine that a process may use: a control group may allow less than there is."""

from __future__ import annotations

import os
from pathlib import Path

# The files of a group's limit and of its use, in version 2 and version 1 of control groups.
_GROUPS = [
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
]


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
    """The limit and the use of each control group that has a limit."""
    found = []
    for limit, used in _GROUPS:
        try:
            most, now = (float(Path(path).read_text(encoding="utf-8")) for path in (limit, used))
            found.append((most, now))
        except (OSError, ValueError):  # not there, or "max"
            continue
    return found
