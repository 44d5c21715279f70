"""The nodes and neighbours of ranks, by integer arithmetic."""

from __future__ import annotations

import pytest

from longctx.topology import Link, Topology, split


def test_ranks_are_node_major():
    topology = Topology(2, 4)
    assert [topology.node_of(r) for r in range(8)] == [0] * 4 + [1] * 4
    assert topology.level(3, 0) == "inner"
    assert topology.level(3, 4) == "outer"


def test_a_world_that_is_no_product_is_refused():
    with pytest.raises(ValueError, match="nodes=3 does not divide the 8 ranks"):
        split(8, 3)
    with pytest.raises(ValueError, match="nodes=0"):
        Topology(0, 1)
    with pytest.raises(ValueError, match="bandwidth"):
        Link(0)
