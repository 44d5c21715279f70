"""What ranks say to each other outside attention: waiting as long as it takes, and the timeout that was asked for."""

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
    """Work of one rank outlasts the timeout of collectives, which `start` has set on the world that stood already."""
    worlds._set_timeout(timedelta(seconds=seconds))
    assert transport._timeout_of(dist.group.WORLD) == timedelta(seconds=seconds)
    here = Ranks(rank, world, rank, world, torch.device("cpu"))
    with here.agree("something long"):
        if rank == 1:
            time.sleep(2.5 * seconds)
    here.wait()
    if rank == 0:  # a collective without its peer, which is late
        with pytest.raises(RuntimeError, match=r"(?i)time"):
            dist.all_reduce(torch.zeros(1))
    else:
        time.sleep(2.5 * seconds)


def test_one_ranks_long_work_does_not_time_out(tmp_path: Path) -> None:
    failures = run_ranks(2, check_patience, [1.0], tmp_path / "store", leaves=0)
    assert not failures, failures
