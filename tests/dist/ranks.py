"""Starts N ranks once, over gloo or over NCCL on one GPU, runs many cases on them and reports what failed where.

The ranks are forked from a server that has imported torch and longctx once, so that starting eight of them
is cheap.
"""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from longctx.bench import faults_run

CONTEXT = faults_run.CONTEXT  # a process has one server; whatever starts it preloads this list
CONTEXT.set_forkserver_preload([*faults_run.PRELOAD, "tests.dist.preload"])


def forked(function: Callable[..., int], *arguments: Any, log: Path, **environment: str) -> Any:
    """Start a process in a session of its own, as a terminal does; it runs function(*arguments) and ends.

    Its standard output and error are the files LOG.out and LOG.err.
    """
    process = CONTEXT.Process(target=_forked, args=(function, arguments, str(log), environment))
    process.start()
    return process


def _forked(function: Callable[..., int], arguments: Sequence[Any], log: str, environment: dict[str, str]) -> None:
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{log}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    for name in ("RANK", "WORLD_SIZE"):
        os.environ.pop(name, None)
    os.environ.update(environment)
    sys.exit(function(*arguments))


def run_ranks(
    world: int,
    body: Callable[..., Any],
    cases: Sequence[Any],
    store: Path,
    timeout: float = 900.0,
    leaves: int = 0,
    nccl: bool = False,
) -> dict[Any, list[str]]:
    """Run body(rank, world, case) on every rank for every case; returns the failures, {case: ["rank r: traceback"]}.

    `leaves`: number of ranks that are expected to die without a report. nccl: the ranks share the first CUDA device; they are spawned,
    because the server has DeepSpeed set up for CPUs, and CUDA does not outlive a fork.
    """
    context: Any = multiprocessing.get_context("spawn") if nccl else CONTEXT
    results: Any = context.Queue()
    processes = [
        context.Process(
            target=_rank, args=(rank, world, body, list(cases), str(store), results, leaves, nccl), daemon=True
        )
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    failures: dict[Any, list[str]] = {}
    try:
        for _ in range(world - leaves):
            rank, found = _next(results, processes, timeout, leaves)
            for case, text in found:
                failures.setdefault(case, []).append(f"rank {rank}: {text}")
    finally:
        for process in processes:
            process.join(timeout=10)
            if process.is_alive():
                process.kill()
    return failures


def _next(results: Any, processes: Sequence[Any], timeout: float, leaves: int) -> tuple[int, list]:
    """The next rank's report; AssertionError when more ranks have died than may."""
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        try:
            return results.get(timeout=1.0)
        except queue.Empty:
            dead = [process.exitcode for process in processes if process.exitcode not in (None, 0)]
            assert len(dead) <= leaves, f"ranks ended with {dead} and reported nothing"
    raise AssertionError(f"no rank reported within {timeout} s")


def _rank(
    rank: int, world: int, body: Callable, cases: list, store: str, results: Any, leaves: int, nccl: bool
) -> None:
    import torch
    import torch.distributed as dist

    from longctx.distributed.ranks import shared_gpu

    torch.set_num_threads(1)
    os.environ.setdefault("MASTER_ADDR", "localhost")  # as every launcher does; older accelerate looks for it
    if nccl:
        os.environ.update(shared_gpu(rank))
        torch.cuda.set_device(0)
    found = []
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if nccl else "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=600),
    )
    for case in cases:
        try:
            body(rank, world, case)
        except Exception:
            found.append((case, traceback.format_exc(limit=4)))
            if "PeerLost" in found[-1][1]:
                break  # the ring is broken: later cases would hang
    results.put((rank, found))
    if not found and not leaves:
        dist.barrier()
        dist.destroy_process_group()
