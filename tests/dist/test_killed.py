"""What a user reads when a rank is killed."""

from __future__ import annotations

import signal

import pytest

from longctx.distributed.launcher import TORCH_SWITCHES
from longctx.distributed.local import run_ranks


def test_only_our_line_is_printed_where_rank_0_and_its_store_are_killed(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """torch warns of the store with a dozen C++ frames; processes of their own, since torch reads its level once."""
    for name in TORCH_SWITCHES:
        monkeypatch.delenv(name, raising=False)
    ended = run_ranks(2, 1, "tests.dist.killed")
    assert ended.statuses == [-signal.SIGKILL, 1]
    said = capfd.readouterr()
    assert said.out == ""
    (line,) = said.err.splitlines()
    assert line.startswith("longctx: rank 1 lost its peers and stops (") and "gloo/" not in line
