"""The undisturbed run with which the launch tests compare a disturbed one."""

from __future__ import annotations

from pathlib import Path

import pytest

from longctx.run.command import compose
from tests.launch.tiny import words
from tests.train.lives import live


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of two forked ranks that nobody disturbs; they count as two nodes."""
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    assert live(compose([*words(run_dir=run), "launch.nproc=2", "parallel.nodes=2"]), 2) == 0
    return run
