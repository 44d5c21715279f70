"""Ranks started on this machine, through torch.distributed's own agent."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

from longctx.errors import RunFailed, UserError

T = TypeVar("T")


def agent(nproc: int, **changes: Any) -> Any:
    """The configuration of torch's agent for `nproc` ranks on this machine that are never restarted."""
    from torch.distributed.launcher.api import LaunchConfig

    return LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=nproc, run_id=f"longctx-{os.getpid()}",
        rdzv_backend="c10d", rdzv_endpoint="localhost:0", max_restarts=0, monitor_interval=0.1,
        start_method="spawn", local_addr="localhost", **changes,
    )  # fmt: skip


def start(nproc: int, entry: Callable[..., T], *arguments: Any) -> T:
    """Run entry(*arguments) on `nproc` ranks over gloo; returns what rank 0's returned.

    Raises UserError or RunFailed with the first failing rank's own message.
    """
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch

    try:
        answers = elastic_launch(agent(nproc), guarded)(entry, *arguments)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        raise RunFailed(f"rank {rank} of {nproc} failed (status {failure.exitcode}): {failure.message}") from None
    found, problem = answers[0]
    if problem is not None:
        raise UserError(problem)
    return found


def guarded(entry: Callable[..., T], *arguments: Any) -> tuple[T | None, str | None]:
    """Returns (what entry returned, None), or (None, the message) of a user's mistake, which crosses as text."""
    try:
        return entry(*arguments), None
    except UserError as error:
        return None, str(error)
