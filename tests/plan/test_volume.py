"""Closed-form byte counts against the schedules' plain data, on every grid up to 4 x 4."""

import pytest

from longctx.planner.volume import busiest
from longctx.schedule import SCHEDULES, Sizes, build
from longctx.topology import Topology

GRIDS = [(1, 1), (1, 4), (2, 1), (2, 2), (2, 4), (3, 2), (4, 4)]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("kv_heads", [1, 2, 8])
@pytest.mark.parametrize("backward", [False, True])
def test_formula_equals_the_schedule(schedule, kv_heads, backward):
    sizes = Sizes(64, 8, kv_heads, 16, batch=2, wire_bytes=2, grad_bytes=4)
    for nodes, ranks in GRIDS:
        topology = Topology(nodes, ranks)
        divisors = [h for h in (1, 2, 4) if ranks % h == 0] if schedule == "ulysses_ring" else [1]
        for h in divisors:
            every = [
                build(schedule, topology, rank, backward=backward, ulysses=h).bytes(sizes)
                for rank in range(topology.size)
            ]
            counted = {level: max(sent[level] for sent in every) for level in ("inner", "outer")}
            assert counted == busiest(schedule, topology, sizes, backward=backward, ulysses=h), (
                nodes,
                ranks,
                h,
            )


def test_the_double_ring_sends_between_nodes_what_the_facts_say():
    sizes = Sizes(256, 8, 8, 64, wire_bytes=4, grad_bytes=4)
    block = 2 * 256 * 8 * 64 * 4
    assert busiest("flat_ring", Topology(4, 4), sizes, backward=False)["outer"] == 15 * block
    assert busiest("double_ring", Topology(4, 4), sizes, backward=False) == {
        "inner": 12 * block,
        "outer": 3 * block,
    }
    assert busiest("double_ring", Topology(4, 4), sizes, backward=True)["outer"] == 3 * 2 * block


def test_an_unknown_schedule_is_refused():
    with pytest.raises(ValueError, match="'ring' has no formula"):
        busiest("ring", Topology(2, 2), Sizes(1, 1, 1, 1), backward=False)
