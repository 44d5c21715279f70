"""What several parts' tests share: the shortened quickstart, run once as a user would start it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.started import SHORT, longctx


@pytest.fixture(scope="session")
def quickstart(tmp_path_factory) -> Path:
    """The folder of a quickstart with shortened stages."""
    run = tmp_path_factory.mktemp("quickstart") / "run"
    done = longctx("train", "experiment=quickstart", f"run_dir={run}", *SHORT)
    assert done.returncode == 0, done.stderr[-4000:]
    (run.parent / "stderr.txt").write_text(done.stderr)
    return run
