"""Starting the ranks on this machine, through the agent of torch.distributed.run, and ending them together.

The ranks read the resolved config from the run's folder. SIGTERM, SIGUSR1 and SIGHUP are passed on to them
(finish the step, save, leave with 75); ctrl-C ends them at once. When a rank dies its own error stands on the
screen, the others are stopped within seconds, and one last line says what happened.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from longctx import console
from longctx.processes import warn_if_crowded
from longctx.train.signals import INTERRUPTED, SAVED_AND_REQUEUE, asking, go_silent

if TYPE_CHECKING:
    from longctx.config.train import LaunchConfig

PATIENCE = 10.0  # seconds that the other ranks have to notice a dead one before they are killed


def start_ranks(launch: LaunchConfig, resolved: Path) -> int:
    """Run `python -m longctx.train --resolved FILE` on launch.nproc ranks; returns the run's exit status."""
    import logging

    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig as AgentConfig
    from torch.distributed.launcher.api import elastic_launch

    warn_if_crowded("launch.nproc", launch.nproc)
    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)  # the agent's report would bury the rank's error
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    agent = AgentConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=launch.nproc, run_id=f"longctx-{os.getpid()}",
        rdzv_backend="c10d", rdzv_endpoint="localhost:0", max_restarts=0, monitor_interval=0.1,
        start_method="spawn", signals_to_handle="SIGQUIT", local_addr="localhost",
    )  # fmt: skip
    threads = launch.threads or max(1, len(os.sched_getaffinity(0)) // launch.nproc)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))  # read by the ranks when they load torch
    with _forwarding() as forwarded, _reaper():
        try:
            elastic_launch(agent, sys.executable)("-m", "longctx.train", "--resolved", str(resolved))
            return 0
        except ChildFailedError as error:
            return _explain(error, forwarded, resolved.parent)


def _explain(error: Any, forwarded: list[int], run: Path) -> int:
    """The last line, and the status: the first failing rank's own, translated where a signal ended it."""
    if signal.SIGINT in forwarded:
        console.say(f"longctx: interrupted; {_where(run)}")
        return INTERRUPTED
    rank, failure = error.get_first_failure()
    codes = {f.exitcode for f in error.failures.values()}
    if SAVED_AND_REQUEUE in codes:
        return SAVED_AND_REQUEUE
    if failure.exitcode == 2 or codes == {2}:
        return 2
    if failure.exitcode < 0:
        name = signal.Signals(-failure.exitcode).name
        console.say(f"longctx: rank {rank} was ended by {name}, the others were stopped; {_where(run)}")
    else:
        console.say(f"longctx: rank {rank} failed (status {failure.exitcode}), the others were stopped; {_where(run)}")
    return 1


def _where(run: Path) -> str:
    import json

    pointer = run / "latest.json"
    if not pointer.exists():
        return "no checkpoint was written yet"
    step = json.loads(pointer.read_text())["checkpoint"].rsplit("step", 1)[-1]
    return f"the checkpoint of step {int(step)} stands, the same command continues the run"


@contextmanager
def _forwarding() -> Iterator[list[int]]:
    """Pass signals on to the ranks; yields the list of those that came."""
    came: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:
        came.append(number)
        if number == signal.SIGHUP:
            go_silent()
        for pid in _children():
            _send(pid, number)

    before = {number: signal.signal(number, forward) for number in (signal.SIGINT, *asking())}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _reaper() -> Iterator[None]:
    """Once a rank has failed, kill after PATIENCE whatever is still running (a rank stuck in a
    collective).
    """
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.2):
            if any(_failed(pid) for pid in _children()):
                if not done.wait(PATIENCE):
                    for pid in _children():
                        _send(pid, signal.SIGKILL)
                return

    threading.Thread(target=watch, name="reaper", daemon=True).start()
    try:
        yield
    finally:
        done.set()


def _children() -> list[int]:
    """Processes this one started: the ranks (the agent starts nothing else)."""
    found = []
    for task in Path("/proc/self/task").iterdir():
        try:
            found += [int(pid) for pid in (task / "children").read_text().split()]
        except OSError:  # the thread has ended
            continue
    return found


def _failed(pid: int) -> bool:
    """Whether a child has ended badly; it stays for the agent to collect."""
    try:
        info = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return info is not None and info.si_status not in (0, SAVED_AND_REQUEUE)


def _send(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return
