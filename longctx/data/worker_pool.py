"""A pool of processes that tokenize shards; each process writes one shard at a time."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection, Pipe, wait
from os import getpid
from pathlib import Path

from longctx.data.tokens import ShardJob, TokenizerSpec
from longctx.errors import RunFailed
from longctx.processes import how_ended, kill, module_command
from longctx.signals import sweep, swept


def tokenize_by(count: int, jobs: Sequence[ShardJob], spec: TokenizerSpec, shards: Path) -> Iterator[ShardJob]:
    """Write the shards into the folder `shards` with `count` worker processes; yields each job when it is finished.

    Raises the error of a failed job, and RunFailed when a worker dies. All workers have ended when this returns or
    raises.
    """
    waiting = sorted(jobs, key=lambda job: job.size)  # pop() takes the largest, so that the workers end together
    workers: dict[Connection, subprocess.Popen[bytes]] = {}
    running: dict[Connection, ShardJob] = {}
    with swept(shards):
        try:
            for _ in range(count):
                pipe = _start_worker(workers)
                pipe.send(spec)
                running[pipe] = waiting.pop()
                pipe.send(running[pipe])
            while running:
                for pipe in wait(list(running)):
                    assert isinstance(pipe, Connection)
                    yield _finished_job(pipe, workers[pipe], running)
                    if waiting:
                        running[pipe] = waiting.pop()
                        pipe.send(running[pipe])
        finally:
            pids = [worker.pid for worker in workers.values()]
            kill(pids)
            for pipe, worker in workers.items():
                worker.wait()
                pipe.close()
            sweep(shards, owners=pids)


def _start_worker(workers: dict[Connection, subprocess.Popen[bytes]]) -> Connection:
    """Start a worker in a process group of its own, so that ctrl-C in a terminal reaches only the parent."""
    ours, theirs = Pipe()
    command, environment = module_command("longctx.data.worker", str(theirs.fileno()), str(getpid()))
    with theirs:
        workers[ours] = subprocess.Popen(
            command, env=environment, pass_fds=[theirs.fileno()], process_group=0, stdin=subprocess.DEVNULL
        )
    return ours


def _finished_job(pipe: Connection, worker: subprocess.Popen[bytes], running: dict[Connection, ShardJob]) -> ShardJob:
    """Return the job that a worker reports as finished, or raise the error that it reports."""
    try:
        error = pipe.recv()
    except (EOFError, ConnectionResetError):
        status = worker.wait()
        killed = "; if memory ran out (`dmesg` says so), `longctx data workers=1` needs the least" * (
            status == -signal.SIGKILL
        )
        raise RunFailed(f"a tokenizing worker {how_ended(status)}{killed}") from None
    if error is not None:
        raise error
    return running.pop(pipe)
