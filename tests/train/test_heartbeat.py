"""A rank that hangs ends the run: the other ranks' watchdogs name it, whichever it is and however it hangs."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .lives import ASLEEP, STOPPED, live, said
from .made import config


def test_the_rank_that_hangs_is_named_and_the_run_ends(tmp_path: Path, documents: Path) -> None:
    """Rank 1 sleeps in its third step, which rank 0 reports; rank 0 is stopped in its second, which rank 1 reports."""
    cases = {"asleep": (1, 3, ASLEEP), "stopped": (0, 2, STOPPED)}
    made = {
        name: config(tmp_path / name, documents, launch={"nproc": 2, "threads": 1}, guards={"stall_seconds": 6})
        for name in cases
    }
    with ThreadPoolExecutor() as pool:
        lives = {name: pool.submit(live, made[name], 2, hangs=case) for name, case in cases.items()}
    assert {name: done.result() for name, done in lives.items()} == {"asleep": 1, "stopped": 1}
    told = said(tmp_path / "asleep", 0).splitlines()[-1]
    assert told.startswith("longctx: rank 1 stalls at step 2: it has been in ")
    assert "guards.stall_seconds=6" in told
    told = said(tmp_path / "stopped", 1).splitlines()[-1]
    assert told.startswith("longctx: rank 0 stalls at step 2: its process no longer answers, while the others wait in ")
