"""Starts ranks on this machine as processes of `python -m MODULE`, and ends them together.

SIGTERM, SIGUSR1 and SIGHUP are passed on to a rank once it handles them (it saves and exits with 75), so a rank that is
still importing neither loses a signal nor dies of it. Ctrl-C ends all ranks at once. When a rank dies, it has printed
its own error; the others get PATIENCE seconds to end and are then killed.
"""

from __future__ import annotations

import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass

from longctx.processes import handles, kill, module_command, send
from longctx.signals import SAVED_AND_REQUEUE, StopRequest, stop_request

STORE_FD = "LONGCTX_STORE_FD"  # rank 0: the listening socket of the store at MASTER_PORT; empty for the others
PATIENCE = 10.0  # seconds that the other ranks have to end after one died
SAVING = 120.0  # seconds that the other ranks have to end after one exited with 75


@dataclass(frozen=True)
class RankExits:
    """The exit statuses of all ranks, and the first rank that did not exit with 0 (its rank and status)."""

    first: tuple[int, int] | None
    statuses: list[int]


def run_ranks(nproc: int, threads: int, module: str, *words: str) -> RankExits:
    """Run `python -m MODULE WORDS` once per rank, in torchrun's environment; returns when all ranks have ended."""
    stop = stop_request()
    stop.unsaved()  # the ranks answer signals, not this process
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
    """Start the processes into `ranks`; rank 0 inherits the store's socket, so no other process can take its port."""
    with socket.create_server(("127.0.0.1", 0)) as store:
        world = {"WORLD_SIZE": str(nproc), "LOCAL_WORLD_SIZE": str(nproc), "MASTER_ADDR": "127.0.0.1",
                 "MASTER_PORT": str(store.getsockname()[1])}  # fmt: skip
        environment = {"OMP_NUM_THREADS": str(threads), **environment, **world}
        for rank in range(nproc):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            fds = [store.fileno()] if rank == 0 else []
            own[STORE_FD] = str(store.fileno()) if rank == 0 else ""
            # Each rank gets its own session, so a terminal's ctrl-C reaches only this process, which ends the ranks.
            ranks.append(subprocess.Popen(command, env={**environment, **own}, pass_fds=fds, start_new_session=True))


def _follow(ranks: list[subprocess.Popen[bytes]], stop: StopRequest) -> RankExits:
    """Wait for all ranks, passing signals on to them, and kill those that outlive a failed rank for too long."""
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
    return RankExits(first or next(((n, s) for n, s in enumerate(statuses) if s), None), statuses)
