"""Runs a command of longctx as a terminal does, interrupts it, and finds the processes and files that remain."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from longctx.processes import alive, handles


@dataclass(frozen=True)
class Outcome:
    """status: what a shell would show. left: processes that outlived it. partial: half-written files in its folder."""

    status: int
    said: str
    left: list[int]
    partial: list[str]


class Command:
    """`python -m longctx WORDS` in a process group of its own, in `folder`."""

    def __init__(self, folder: Path, words: Sequence[str], module: str = "longctx") -> None:
        self.folder, self._mark = folder, f"LONGCTX_TEST_MARK={uuid.uuid4().hex}"
        folder.mkdir(parents=True, exist_ok=True)
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
        name, value = self._mark.split("=")
        root = str(Path(__file__).parents[1])
        self.process = subprocess.Popen(
            [sys.executable, "-m", module, *words], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
            cwd=folder, env={**environment, name: value, "PYTHONPATH": root}, start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
        )  # fmt: skip
        while not handles(self.process.pid, signal.SIGTERM) and self.process.poll() is None:
            time.sleep(0.001)  # the interpreter itself is starting

    def send(self, number: int, after: float = 0.0) -> None:
        """Send the signal to the whole group, as a terminal does."""
        end = time.monotonic() + after
        while time.monotonic() < end and self.process.poll() is None:
            time.sleep(0.002)
        if self.process.poll() is None:
            os.killpg(self.process.pid, number)

    def outcome(self, timeout: float = 280) -> Outcome:
        said = self.process.communicate(timeout=timeout)[1]
        left = self._left()
        partial = [str(path) for path in self.folder.rglob("*") if ".partial" in path.name]
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        return Outcome(self.process.returncode, said, left, partial)

    def _left(self) -> list[int]:
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            try:
                if self._mark.encode() in (path / "environ").read_bytes() and alive(int(path.name)):
                    found.append(int(path.name))
            except OSError:
                continue
        return found
