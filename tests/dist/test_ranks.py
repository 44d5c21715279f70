"""Communication of ranks outside attention: waits without a limit, and the requested timeout."""

from __future__ import annotations

import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from longctx.distributed import transport
from longctx.distributed import ranks as worlds
from longctx.distributed.ranks import Ranks
from tests.dist.ranks import run_ranks


def check_patience(rank: int, world: int, seconds: float) -> None:
    """One rank works for longer than the timeout of collectives, which `start` has set on a world that existed before."""
    store = dist.distributed_c10d._get_default_store()
    worlds._set_timeout(timedelta(seconds=seconds))
    assert transport._timeout_of(dist.group.WORLD) == timedelta(seconds=seconds)
    here = Ranks(rank, world, rank, world, torch.device("cpu"))
    with here.agree("something long"):
        if rank == 1:
            time.sleep(1.2 * seconds)
    worlds._set_timeout(timedelta(seconds=0.3))
    if rank == 0:  # a collective whose peer comes only after it has ended
        with pytest.raises(RuntimeError, match=r"(?i)time"):
            dist.all_reduce(torch.zeros(1))
        store.set("timed out", "yes")
    else:
        store.wait(["timed out"], timedelta(seconds=200))


def test_one_ranks_long_work_does_not_time_out(tmp_path: Path) -> None:
    """Ranks meet within a second of each other, so that a timeout of 4 seconds suffices on a busy machine too."""
    failures = run_ranks(2, check_patience, [4.0], tmp_path / "store", leaves=0)
    assert not failures, failures
