"""A run as a person starts it: launcher and ranks in a process group of their own, watched from outside."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from longctx.bench.faults_run import RunWatcher


class Started(RunWatcher):
    """Any process that trains in a run's folder."""

    def __init__(self, run: Path, process: subprocess.Popen) -> None:
        super().__init__(run)
        self.process = process

    def wait_for(self, seconds: float) -> bool:
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return True
        return False


class Launched(Started):
    """`python -m longctx.run --resolved RUN/config.yaml`, which starts its own ranks."""

    def __init__(self, run: Path) -> None:
        self._file = open(run / "life.log", "w+")  # noqa: SIM115
        process = subprocess.Popen(
            [sys.executable, "-m", "longctx.run", "--resolved", str(run / "config.yaml")],
            stdout=self._file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")},
        )
        super().__init__(run, process)

    def terminate(self) -> tuple[int, str]:
        self.process.terminate()
        return self.wait()

    def wait(self) -> tuple[int, str]:
        """(status, everything it said)."""
        status = self.process.wait(240)
        self._file.seek(0)
        return status, self._file.read()


def children(pid: int) -> list[int]:
    """Pids of a process's children, whichever of its threads started them."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*"):
        try:
            found += [int(text) for text in (task / "children").read_text().split()]
        except OSError:
            continue
    return found


def alive(pid: int) -> bool:
    """Whether a process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False
