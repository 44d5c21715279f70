"""Starts the ranks of a training run on this machine, and explains in one line how they ended."""

from __future__ import annotations

import os
import signal
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from longctx import console
from longctx.distributed.local import Node, RankExits, run_ranks
from longctx.host_memory import killed_for_memory
from longctx.processes import how_ended
from longctx.signals import SAVED_AND_REQUEUE, interrupted_words, swept
from longctx.train.runfolder import where

if TYPE_CHECKING:
    from longctx.config.train import LaunchConfig


def run_ranks_and_explain(
    launch: LaunchConfig, nproc: int, run: Path, cache: Path, module: str, *words: str, node: Node | None = None
) -> int:
    """Start nproc ranks of `python -m MODULE WORDS`, and return the run's exit status.

    run, cache: the folders in which a killed rank may leave half-written files. node: see `run_ranks`.
    """
    threads = launch.threads or max(1, len(os.sched_getaffinity(0)) // nproc)
    interrupted_words(lambda: where(run))
    killed_before = killed_for_memory()
    with ExitStack() as folders:
        for folder in (run, cache):
            folders.enter_context(swept(folder))
        ended = run_ranks(nproc, threads, module, *words, node=node)
    return _explain(ended, run, killed_before)


def _explain(ended: RankExits, run: Path, killed_before: int | None) -> int:
    """Write the last line, and return the status of the first rank that failed (1 where a signal ended it)."""
    if ended.first is None:
        return 0
    rank, status = ended.first
    if SAVED_AND_REQUEUE in ended.statuses:
        return SAVED_AND_REQUEUE
    if status == 2:
        return 2
    who = _who_kills(killed_before) if status == -signal.SIGKILL else ""
    console.last_line(f"rank {rank} {how_ended(status)}{who}, the others were stopped; {where(run)}")
    return 1


def _who_kills(killed_before: int | None) -> str:
    """The sender of a SIGKILL, in words, by the kernel's count of processes it killed for memory."""
    now = killed_for_memory()
    remedy = "`longctx plan` with the same settings shows what a rank holds, and docs/memory.md how to lower it"
    if now is not None and killed_before is not None and now > killed_before:
        return f" of the kernel's out-of-memory killer: the machine had no memory left ({remedy})"
    return f" (so the kernel's out-of-memory killer ends a process; if `dmesg` names it: {remedy})"
