"""Groups of worker processes that wait for requests, so that two programs alternate on the same warm cores.

Each worker has a number of threads and a function `serve(request) -> answer`. A request goes to all workers of a group
at once. When a worker raises, the parent raises RunFailed with the worker's traceback.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import socket
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

from longctx.errors import RunFailed

ANSWER_SECONDS = 600.0
Serve = Callable[[Any], Any]
Prepare = Callable[[int, int, int, Any], Serve]  # (rank, world, port, settings) -> serve


class WorkerGroup:
    """`size` worker processes of `threads` threads each; `prepare(rank, size, port, settings)` makes their `serve`."""

    def __init__(self, size: int, threads: int, prepare: Prepare, settings: Any) -> None:
        context = mp.get_context("spawn")
        port = _free_port()
        self._pipes: list[Connection] = []
        self._processes = []
        # torch reads the number of threads when it is imported, before `_work` runs.
        before = os.environ.get("OMP_NUM_THREADS")
        os.environ["OMP_NUM_THREADS"] = str(threads)
        try:
            for rank in range(size):
                ours, theirs = context.Pipe()
                arguments = (theirs, prepare, rank, size, port, settings, threads)
                process = context.Process(target=_work, args=arguments, daemon=True)
                process.start()
                theirs.close()
                self._pipes.append(ours)
                self._processes.append(process)
        finally:
            if before is None:
                del os.environ["OMP_NUM_THREADS"]
            else:
                os.environ["OMP_NUM_THREADS"] = before

    def ask(self, request: Any) -> list[Any]:
        """Send `request` to every worker; returns their answers in rank order."""
        for pipe in self._pipes:
            with suppress(BrokenPipeError):  # a worker that failed while it prepared has said why
                pipe.send(request)
        answers = []
        for rank, pipe in enumerate(self._pipes):
            try:
                if not pipe.poll(ANSWER_SECONDS):
                    raise RunFailed(f"worker {rank} gave no answer within {ANSWER_SECONDS:.0f} s")
                kind, answer = pipe.recv()
            except EOFError:
                raise RunFailed(f"worker {rank} died") from None
            if kind == "failed":
                raise RunFailed(f"worker {rank} failed:\n{answer}")
            answers.append(answer)
        return answers

    def close(self) -> None:
        """End the workers."""
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(timeout=5)
            if process.is_alive():
                process.terminate()
                process.join(timeout=5)

    def __enter__(self) -> WorkerGroup:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _work(pipe: Connection, prepare: Prepare, rank: int, size: int, port: int, settings: Any, threads: int) -> None:
    import torch

    torch.set_num_threads(threads)
    try:
        serve = prepare(rank, size, port, settings)
        while True:
            request = pipe.recv()
            pipe.send(("done", serve(request)))
    except (EOFError, KeyboardInterrupt):
        pass
    except Exception:  # the parent prints it: a worker has no terminal of its own
        pipe.send(("failed", traceback.format_exc(limit=6)))
