"""A run as a user starts it: launcher and ranks in a process group of their own, watched from outside."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from longctx.bench.faults_run import RunWatcher
from tests import warm
from tests.dist.ranks import forked


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


class Launched(RunWatcher):
    """`python -m longctx.run --resolved RUN/config.yaml`, which starts its own ranks as `longctx train` does."""

    def __init__(self, run: Path) -> None:
        super().__init__(run)
        self.process = forked(
            warm.command, ["-m", "longctx.run", "--resolved", str(run / "config.yaml")], os.getcwd(), dict(os.environ),
            log=run / "life",
        )  # fmt: skip

    @property
    def pid(self) -> int:
        return self.process.pid

    def wait_for(self, seconds: float) -> bool:
        self.process.join(seconds)
        return self.process.is_alive()

    def terminate(self) -> tuple[int, str]:
        self.process.terminate()
        return self.wait()

    def wait(self) -> tuple[int, str]:
        """(status, everything it and its ranks said on standard error)."""
        self.process.join(240)
        said = (self.run / "life.err").read_text()
        assert self.process.exitcode is not None, said
        return self.process.exitcode, said
