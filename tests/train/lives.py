"""Lives of one run on changing ranks and engines: processes forked from a server that has imported torch."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

from longctx.config.train import TrainConfig
from longctx.run.training import settled
from longctx.train import runfolder
from tests.dist.ranks import CONTEXT


def live(config: TrainConfig, world: int, *, stop_after: int | None = None, kill_after: int | None = None) -> int:
    """Train on `world` ranks, as torchrun would start them; the status of the first that did not end with 0.

    stop_after: SIGTERM reaches every rank while it does this step (counted over the run). kill_after: SIGKILL ends
    every rank once it has logged this step, before it saves.
    """
    run = runfolder.prepare(settled(config))
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    ranks = [
        CONTEXT.Process(target=_rank, args=(run, rank, world, port, stop_after, kill_after)) for rank in range(world)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(240)
        if process.is_alive():
            process.kill()
            process.join()
    return next((status for process in ranks if (status := process.exitcode)), 0)


def _rank(run: Path, rank: int, world: int, port: int, stop_after: int | None, kill_after: int | None) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world))
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port))
    from longctx.run.rank import main
    from longctx.train import loop

    done, logged = loop._advance, loop._log

    def advance(state: Any, *arguments: Any) -> None:
        done(state, *arguments)
        if state.step == stop_after:
            signal.raise_signal(signal.SIGTERM)

    def log(job: Any, *arguments: Any) -> None:
        logged(job, *arguments)
        if job.state.step == kill_after:
            time.sleep(0.5)  # wandb's own process may take its rows
            signal.raise_signal(signal.SIGKILL)

    loop._advance, loop._log = advance, log
    sys.exit(main(str(run / "config.yaml")))
