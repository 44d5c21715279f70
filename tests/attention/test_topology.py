"""Where ranks sit, from numbers, the environment or a file."""

from __future__ import annotations

import pytest

from longctx.topology import Link, Topology, from_environment, from_file, split


def test_ranks_are_node_major():
    topology = Topology(2, 4)
    assert [topology.node_of(r) for r in range(8)] == [0] * 4 + [1] * 4
    assert topology.level(3, 0) == "inner"
    assert topology.level(3, 4) == "outer"


def test_the_environment_of_torchrun_and_slurm():
    assert from_environment({"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}) == Topology(2, 4)
    assert from_environment({"SLURM_NTASKS": "6", "SLURM_NNODES": "3"}) == Topology(3, 2)
    assert from_environment({}) == Topology(1, 1)
    with pytest.raises(ValueError, match="WORLD_SIZE=6"):
        from_environment({"WORLD_SIZE": "6", "LOCAL_WORLD_SIZE": "4"})


def test_a_file_names_links_and_unknown_keys(tmp_path):
    path = tmp_path / "cluster.yaml"
    path.write_text("nodes: 2\nranks: 8\nouter: {bandwidth: 5.0e10, latency: 1.0e-5}\n")
    topology = from_file(path)
    assert topology.link("outer") == Link(5e10, 1e-5)
    assert topology.link("inner") is None
    path.write_text("nodes: 2\nrank: 8\n")
    with pytest.raises(ValueError, match="rank"):
        from_file(path)


def test_a_world_that_is_no_product_is_refused():
    with pytest.raises(ValueError, match="nodes=3 does not divide the 8 ranks"):
        split(8, 3)
    with pytest.raises(ValueError, match="nodes=0"):
        Topology(0, 1)
    with pytest.raises(ValueError, match="bandwidth"):
        Link(0)
