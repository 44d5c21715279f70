"""Starts the ranks of a training run on this machine, and says in one last line how they ended."""

from __future__ import annotations

import os
import signal
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from longctx import console
from longctx.distributed.local import Ended, run_ranks
from longctx.signals import SAVED_AND_REQUEUE, interrupted_words, swept
from longctx.train.runfolder import where

if TYPE_CHECKING:
    from longctx.config.train import LaunchConfig


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
