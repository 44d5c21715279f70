"""Real ranks: bad input, subgroups, DDP beside the ring, and a peer that dies."""

from __future__ import annotations

from tests.dist.groups import CASES, check
from tests.dist.ranks import run_ranks


def test_errors_groups_and_engines(tmp_path):
    cases = [name for name in CASES if name != "peer_dies"]
    failures = run_ranks(4, check, cases, tmp_path / "store")
    assert not failures, failures


def test_a_dead_peer_is_named_on_the_others(tmp_path):
    failures = run_ranks(3, check, ["peer_dies"], tmp_path / "store", leaves=1)
    assert not failures, failures
