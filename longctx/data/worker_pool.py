"""Processes that tokenize shards, each one shard at a time."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection, Pipe, wait
from os import getpid
from pathlib import Path

from longctx.data.tokens import ShardJob, TokenizerSpec
from longctx.errors import RunFailed
from longctx.processes import kill, module_command
from longctx.signals import sweep, swept


def tokenize_by(count: int, jobs: Sequence[ShardJob], spec: TokenizerSpec, shards: Path) -> Iterator[ShardJob]:
    """Write the shards into the folder `shards` with `count` workers; yields each job as it is finished.

    Raises what a job raised, and RunFailed when a worker dies. However it ends, no worker is left.
    """
    coming = sorted(jobs, key=lambda job: job.size)  # taken from the end: longest first, so that workers end together
    crew: dict[Connection, subprocess.Popen[bytes]] = {}
    at: dict[Connection, ShardJob] = {}
    with swept(shards):
        try:
            for _ in range(count):
                pipe = _hire(crew)
                pipe.send(spec)
                at[pipe] = coming.pop()
                pipe.send(at[pipe])
            while at:
                for pipe in wait(list(at)):
                    assert isinstance(pipe, Connection)
                    yield _finished(pipe, crew[pipe], at)
                    if coming:
                        at[pipe] = coming.pop()
                        pipe.send(at[pipe])
        finally:
            pids = [worker.pid for worker in crew.values()]
            kill(pids)
            for pipe, worker in crew.items():
                worker.wait()
                pipe.close()
            sweep(shards, owners=pids)


def _hire(crew: dict[Connection, subprocess.Popen[bytes]]) -> Connection:
    """Start a worker in a process group of its own, so that a terminal's ctrl-C is its parent's to answer."""
    ours, theirs = Pipe()
    command, environment = module_command("longctx.data.worker", str(theirs.fileno()), str(getpid()))
    with theirs:
        crew[ours] = subprocess.Popen(
            command, env=environment, pass_fds=[theirs.fileno()], process_group=0, stdin=subprocess.DEVNULL
        )
    return ours


def _finished(pipe: Connection, worker: subprocess.Popen[bytes], at: dict[Connection, ShardJob]) -> ShardJob:
    try:
        error = pipe.recv()
    except (EOFError, ConnectionResetError):
        raise RunFailed(f"a tokenizing worker died with exit code {worker.wait()} (-9: out of memory)") from None
    if error is not None:
        raise error
    return at.pop(pipe)
