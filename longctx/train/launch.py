"""Starting the ranks on this machine as processes of `python -m MODULE`, and ending them together.

SIGTERM, SIGUSR1 and SIGHUP are passed on to each rank once it handles them (save, leave with 75), so that one which is
still importing loses none and dies of none; ctrl-C ends all of them at once. When a rank dies its own error stands on
the screen, the others have PATIENCE to notice, and one last line says what happened.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from longctx import console
from longctx.processes import handles, kill, module_command, send
from longctx.signals import SAVED_AND_REQUEUE, StopRequest, interrupted_words, stop_request, swept
from longctx.train.runfolder import where

if TYPE_CHECKING:
    from longctx.config.train import LaunchConfig

STORE_FD = "LONGCTX_STORE_FD"  # rank 0: the listening socket of the store at MASTER_PORT; empty for the others
PATIENCE = 10.0  # seconds that the other ranks have to notice a dead one before they are killed
SAVING = 120.0  # and to leave after one that left with 75


@dataclass(frozen=True)
class Ended:
    """How the ranks ended: the first that did not end with 0 (its rank and status), and every status."""

    first: tuple[int, int] | None
    statuses: list[int]


def start_ranks(launch: LaunchConfig, resolved: Path, cache: Path) -> int:
    """Run `python -m longctx.train --resolved FILE` on launch.nproc ranks; returns the run's exit status.

    cache: where ranks write tokenized documents.
    """
    run = resolved.parent
    threads = launch.threads or max(1, len(os.sched_getaffinity(0)) // launch.nproc)
    interrupted_words(lambda: where(run))
    with ExitStack() as folders:
        for folder in (run, cache):
            folders.enter_context(swept(folder))
        ended = run_ranks(launch.nproc, threads, "longctx.train", "--resolved", str(resolved))
    return _explain(ended, run)


def run_ranks(nproc: int, threads: int, module: str, *words: str) -> Ended:
    """`python -m MODULE WORDS` once per rank, in torchrun's environment; returns when all have ended."""
    stop = stop_request()
    stop.unsaved()  # a signal is the ranks' to answer
    ranks: list[subprocess.Popen[bytes]] = []
    try:
        _start(ranks, nproc, threads, *module_command(module, *words))
        return _follow(ranks, stop)
    finally:
        kill([rank.pid for rank in ranks if rank.returncode is None])
        stop.close()


def _start(
    ranks: list[subprocess.Popen[bytes]], nproc: int, threads: int, command: Sequence[str], environment: dict[str, str]
) -> None:
    """Fill `ranks`. Rank 0 inherits the store's socket, so that nobody can take its port in between."""
    with socket.create_server(("127.0.0.1", 0)) as store:
        world = {"WORLD_SIZE": str(nproc), "LOCAL_WORLD_SIZE": str(nproc), "MASTER_ADDR": "127.0.0.1",
                 "MASTER_PORT": str(store.getsockname()[1])}  # fmt: skip
        environment = {"OMP_NUM_THREADS": str(threads), **environment, **world}
        for rank in range(nproc):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            fds = [store.fileno()] if rank == 0 else []
            own[STORE_FD] = str(store.fileno()) if rank == 0 else ""
            # A session of its own: a terminal's ctrl-C reaches this process, which ends the ranks.
            ranks.append(subprocess.Popen(command, env={**environment, **own}, pass_fds=fds, start_new_session=True))


def _follow(ranks: list[subprocess.Popen[bytes]], stop: StopRequest) -> Ended:
    """Wait for all ranks; pass a signal on to each; kill what is left after a rank that failed."""
    told: set[int] = set()
    first: tuple[int, int] | None = None
    limit = float("inf")
    while None in [rank.poll() for rank in ranks]:
        failed = [(number, rank.returncode) for number, rank in enumerate(ranks) if rank.returncode]
        if failed and first is None:
            first = next((entry for entry in failed if entry[1] != SAVED_AND_REQUEUE), failed[0])
            limit = time.monotonic() + (SAVING if first[1] == SAVED_AND_REQUEUE else PATIENCE)
        number = stop.number or (signal.SIGTERM if first and first[1] == SAVED_AND_REQUEUE else None)
        running = [rank.pid for rank in ranks if rank.returncode is None]
        for pid in running:
            if number is not None and pid not in told and handles(pid, number):
                send(pid, number)
                told.add(pid)
        if time.monotonic() > limit:
            kill(running)
        time.sleep(0.05)
    statuses = [rank.returncode for rank in ranks]
    return Ended(first or next(((n, s) for n, s in enumerate(statuses) if s), None), statuses)


def _explain(ended: Ended, run: Path) -> int:
    """The last line, and the status: the first failing rank's own, translated where a signal ended it."""
    if ended.first is None:
        return 0
    rank, status = ended.first
    if SAVED_AND_REQUEUE in ended.statuses:
        return SAVED_AND_REQUEUE
    if status == 2:
        return 2
    if status < 0:
        how = f"was ended by {signal.Signals(-status).name}"
    else:
        how = f"failed (status {status})"
    console.say(f"longctx: rank {rank} {how}, the others were stopped; {where(run)}")
    return 1
