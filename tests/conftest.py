"""What several parts' tests share: the shortened quickstart, run once as a user would start it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SHORT = [
    "curriculum.stages.s2048.tokens=40960",
    "curriculum.stages.s8192.tokens=16384",
    "hooks.sibling.run.stage.tokens=32768",
    "hooks.evidence.control.stage.tokens=32768",
    "hooks.evidence.needle.per_cell=1",
    "hooks.evidence.needle.seeds=[11]",
    "hooks.evidence.needle.lengths=[512,2048]",
    "hooks.evidence.heldout_windows=4",
    "evaluate.heldout_sequences=1",
]


def longctx(*words: str, timeout: float = 280, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """`longctx WORDS` as a process of its own, on the test's own interpreter."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    return subprocess.run(
        [sys.executable, "-m", "longctx.cli", *words],
        capture_output=True, text=True, timeout=timeout, cwd=cwd, env=environment,
    )  # fmt: skip


@pytest.fixture(scope="session")
def quickstart(tmp_path_factory) -> Path:
    """The folder of a quickstart with shortened stages."""
    run = tmp_path_factory.mktemp("quickstart") / "run"
    done = longctx("train", "experiment=quickstart", f"run_dir={run}", *SHORT)
    assert done.returncode == 0, done.stderr[-4000:]
    (run.parent / "stderr.txt").write_text(done.stderr)
    return run
