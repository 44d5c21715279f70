"""Lives of one run on changing ranks and engines, as torchrun would start them; the ranks are forked."""

from __future__ import annotations

import multiprocessing.connection
import signal
import socket
import time
from pathlib import Path
from typing import Any

from longctx.config.train import TrainConfig
from longctx.run.training import settled_for_adapter
from longctx.signals import SAVED_AND_REQUEUE
from longctx.train import runfolder
from tests.dist.ranks import forked

STOPPED = "stopped"  # how a rank hangs: the whole process
ASLEEP = "asleep"  # its main thread alone


def live(
    config: TrainConfig, world: int, *, stop_after: int | None = None, kill_after: int | None = None,
    hangs: tuple[int, int, str] | None = None,
) -> int:  # fmt: skip
    """Train on `world` ranks; the status of the first that ended with neither 0 nor 75, otherwise 75 or 0.

    stop_after: SIGTERM reaches every rank while it does this step (counted over the run). kill_after: SIGKILL ends
    every rank once it has logged this step, before it saves. hangs: a rank, the step in which it does, and how.
    RUN/lifeRANK.err has what a rank says, RUN/lifeRANK.out the schedule of each step. Ranks that outlive a failed one
    are killed.
    """
    run = runfolder.prepare(settled_for_adapter(config))
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    ranks = [
        forked(
            one, str(run / "config.yaml"), rank, stop_after, kill_after, hangs, log=run / f"life{rank}",
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world),
            MASTER_ADDR="localhost", MASTER_PORT=port,
        )
        for rank in range(world)
    ]  # fmt: skip
    left, end = list(ranks), time.monotonic() + 240
    while left and time.monotonic() < end and not failed(ranks):
        multiprocessing.connection.wait([process.sentinel for process in left], 1.0)
        left = [process for process in left if process.exitcode is None]
    found = failed(ranks)
    for process in left:
        process.kill()
        process.join()
    statuses = found or [process.exitcode for process in ranks]
    return next((status for status in statuses if status), 0)


def failed(ranks: list[Any]) -> list[int]:
    return [status for process in ranks if (status := process.exitcode) not in (None, 0, SAVED_AND_REQUEUE)]


def one(
    file: str, rank: int, stop_after: int | None, kill_after: int | None, hangs: tuple[int, int, str] | None
) -> int:
    """One rank's life in this process, whose environment is torchrun's; the arguments are those of `live`."""
    from longctx.run.rank import main
    from longctx.train import loop

    done, logged = loop._advance, loop._log

    def advance(state: Any, *arguments: Any) -> None:
        done(state, *arguments)
        if state.step == stop_after:
            signal.raise_signal(signal.SIGTERM)
        if hangs and hangs[:2] == (rank, state.step):
            if hangs[2] == STOPPED:
                signal.raise_signal(signal.SIGSTOP)
            time.sleep(600)

    def log(job: Any, stage: Any, opened: Any, *arguments: Any) -> None:
        logged(job, stage, opened, *arguments)
        print(f"step {job.state.step}: {opened.cp.schedule}", flush=True)
        if job.state.step == kill_after:
            time.sleep(0.5)  # wandb's own process may take its rows
            signal.raise_signal(signal.SIGKILL)

    loop._advance, loop._log = advance, log
    return main(file)


def said(run: Path, rank: int) -> str:
    """Standard error of a rank in the run's last life."""
    return (run / f"life{rank}.err").read_text()
