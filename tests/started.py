"""Starts the command line as a user would, and has the settings that shorten the quickstart."""

from __future__ import annotations

import subprocess
from pathlib import Path

from tests import warm

SHORT = [
    "curriculum.stages.s2048.tokens=40960",
    "curriculum.stages.s8192.tokens=16384",
    "after_training.sibling.run.stage.tokens=32768",
    "after_training.evidence.control.stage.tokens=32768",
    "after_training.evidence.needle.per_cell=1",
    "after_training.evidence.needle.seeds=[11]",
    "after_training.evidence.needle.lengths=[512,2048]",
    "after_training.evidence.heldout_sequences=4",
    "evaluate.heldout_sequences=1",
]


def longctx(*words: str, timeout: float = 280, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """`longctx WORDS` as a process of its own, see tests/warm.py."""
    return warm.python("-m", "longctx", *words, timeout=timeout, cwd=cwd)
