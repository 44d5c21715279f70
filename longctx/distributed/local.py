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
ONE_GPU = "longctx-rank-"  # with a rank's number: the host that launch/one_gpu.sh makes of each rank for NCCL
PATIENCE = 10.0  # seconds that the other ranks have to end after one died
SAVING = 120.0  # seconds that the other ranks have to end after one exited with 75


@dataclass(frozen=True)
class Node:
    """This machine's place among the nodes of a run; the ranks meet at address:port, on the first node."""

    number: int
    nodes: int
    address: str
    port: int


@dataclass(frozen=True)
class RankExits:
    """The exit statuses of all ranks, and the first rank that did not exit with 0 (its rank and status)."""

    first: tuple[int, int] | None
    statuses: list[int]


def run_ranks(nproc: int, threads: int, module: str, *words: str, node: Node | None = None) -> RankExits:
    """Run `python -m MODULE WORDS` once per rank, in torchrun's environment; returns when all ranks have ended.

    node: where this machine stands, when other machines start ranks of the same run.
    """
    stop = stop_request()
    stop.unsaved(confirms=False)  # the ranks answer signals, not this process
    ranks: list[subprocess.Popen[bytes]] = []
    command, environment = module_command(module, *words)
    environment = {"OMP_NUM_THREADS": str(threads), **environment}
    try:
        if node is None:
            _start_alone(ranks, nproc, command, environment)
        else:
            _start(ranks, nproc, command, environment, node)
        return _follow(ranks, stop, 0 if node is None else node.number * nproc)
    finally:
        kill([rank.pid for rank in ranks if rank.returncode is None])
        stop.close()


def _start_alone(
    ranks: list[subprocess.Popen[bytes]], nproc: int, command: Sequence[str], environment: dict[str, str]
) -> None:
    """Start all ranks of a run; rank 0 inherits the store's socket, so no other process can take its port."""
    with socket.create_server(("127.0.0.1", 0)) as store:
        node = Node(0, 1, "127.0.0.1", store.getsockname()[1])
        _start(ranks, nproc, command, environment, node, store.fileno())


def _start(
    ranks: list[subprocess.Popen[bytes]], nproc: int, command: Sequence[str], environment: dict[str, str], node: Node,
    store: int | None = None,
) -> None:  # fmt: skip
    """Start the processes of a node into `ranks`. store: the socket that rank 0 inherits."""
    world = {"WORLD_SIZE": str(nproc * node.nodes), "LOCAL_WORLD_SIZE": str(nproc), "GROUP_RANK": str(node.number),
             "MASTER_ADDR": node.address, "MASTER_PORT": str(node.port)}  # fmt: skip
    for local in range(nproc):
        rank = node.number * nproc + local
        own = {"RANK": str(rank), "LOCAL_RANK": str(local)}
        if environment.get("NCCL_HOSTID", "").startswith(ONE_GPU):  # a rank on launch/one_gpu.sh's GPU starts these
            own["NCCL_HOSTID"] = f"{ONE_GPU}{rank}"
        if store is not None:
            own[STORE_FD] = str(store) if rank == 0 else ""
        fds = [store] if store is not None and rank == 0 else []
        # Each rank gets its own session, so a terminal's ctrl-C reaches only this process, which ends the ranks.
        ranks.append(
            subprocess.Popen(command, env={**environment, **world, **own}, pass_fds=fds, start_new_session=True)
        )


def _follow(ranks: list[subprocess.Popen[bytes]], stop: StopRequest, lowest: int) -> RankExits:
    """Wait for all ranks, passing signals on to them, and kill those that outlive a failed rank for too long.

    lowest: the number of the first of these ranks.
    """
    told: set[int] = set()
    first: tuple[int, int] | None = None
    limit = float("inf")
    while None in [rank.poll() for rank in ranks]:
        failed = [(number, rank.returncode) for number, rank in enumerate(ranks, lowest) if rank.returncode]
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
    return RankExits(first or next(((n, s) for n, s in enumerate(statuses, lowest) if s), None), statuses)
