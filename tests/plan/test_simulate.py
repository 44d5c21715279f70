"""Schedules on a clock: known times in closed form, and every schedule finishes on every grid."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longctx.planner.simulate import evenly, simulate
from longctx.schedule import SCHEDULES, Hop, Message, RankSchedule, Sizes, Transfer, build, payload_bytes
from longctx.topology import Link, Topology

SIZES = Sizes(tokens=64, q_heads=8, kv_heads=8, head_dim=16, wire_bytes=4, grad_bytes=4)
GRIDS = [(1, 1), (1, 2), (1, 4), (2, 1), (2, 2), (2, 4), (4, 2), (3, 3), (4, 4)]


def schedules(schedule, nodes, ranks, backward=False):
    topology = Topology(nodes, ranks)
    return [build(schedule, topology, rank, backward=backward) for rank in range(topology.size)]


def outer_only(bandwidth, latency=0.0):
    return {"inner": None, "outer": Link(bandwidth, latency)}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("nodes", "ranks"), GRIDS)
@pytest.mark.parametrize("backward", [False, True])
def test_every_schedule_finishes_and_only_computes_when_links_are_free(schedule, nodes, ranks, backward):
    made = schedules(schedule, nodes, ranks, backward)
    timeline = simulate(made, SIZES, evenly(1.0), {})
    blocks = nodes * ranks // made[0].ulysses
    assert timeline.seconds == pytest.approx(blocks)
    assert timeline.exposed() == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize("backward", [False, True])
def test_link_bound_rings_take_their_outer_bytes_over_the_rate(backward):
    hop = payload_bytes("kv", SIZES) + (payload_bytes("dkv", SIZES) if backward else 0)
    rate = hop / 1.0  # one hop of KV (and dKV) takes one second
    flat = simulate(schedules("flat_ring", 4, 4, backward), SIZES, evenly(0.0), outer_only(rate))
    double = simulate(schedules("double_ring", 4, 4, backward), SIZES, evenly(0.0), outer_only(rate))
    assert flat.seconds == pytest.approx(15.0)
    assert double.seconds == pytest.approx(3.0)


def test_a_message_hides_behind_computation_that_is_longer():
    kv = payload_bytes("kv", SIZES)
    timeline = simulate(schedules("flat_ring", 2, 1), SIZES, evenly(2.0), outer_only(kv / 1.5))
    assert timeline.seconds == pytest.approx(4.0)
    slower = simulate(schedules("flat_ring", 2, 1), SIZES, evenly(2.0), outer_only(kv / 3.0))
    assert slower.seconds == pytest.approx(5.0)
    assert slower.exposed() == pytest.approx(1.0)
    late = simulate(schedules("flat_ring", 2, 1), SIZES, evenly(0.0), outer_only(kv / 1.0, latency=0.25))
    assert late.seconds == pytest.approx(1.25)


def test_starting_later_shifts_the_end():
    made = schedules("flat_ring", 1, 2)
    timeline = simulate(made, SIZES, evenly(1.0), {}, starts=[0.0, 5.0])
    assert timeline.finished[1] == pytest.approx(7.0)
    assert timeline.finished[0] >= 5.0  # its second block comes from the late rank


@settings(max_examples=40)
@given(
    schedule=st.sampled_from(SCHEDULES),
    grid=st.sampled_from(GRIDS),
    backward=st.booleans(),
    compute=st.floats(0.0, 2.0),
    inner=st.floats(1e3, 1e9),
    outer=st.floats(1e3, 1e9),
)
def test_bytes_of_the_spans_are_the_schedules_and_time_is_bounded(schedule, grid, backward, compute, inner, outer):
    made = schedules(schedule, *grid, backward)
    links = {"inner": Link(inner), "outer": Link(outer)}
    timeline = simulate(made, SIZES, evenly(compute), links)
    lower = compute * grid[0] * grid[1] / made[0].ulysses
    for rank, schedule in enumerate(made):
        sent = schedule.bytes(SIZES)
        for level, link in links.items():
            assert timeline.busy(rank, level) == pytest.approx(sent[level] / link.bandwidth)
            lower = max(lower, sent[level] / link.bandwidth)
    total = sum(span.end - span.start for span in timeline.spans)
    assert lower - 1e-9 <= timeline.seconds <= total + 1e-9


def test_a_schedule_that_cannot_finish_is_named():
    lonely = Transfer(1, "kv", "outer", Message(1, 0, 0, "outer"), Message(1, 1, 0, "outer"))
    waits = RankSchedule("flat_ring", 0, False, 1, 1, 0, (Hop(post=(lonely,), wait=(1,)),))
    silent = RankSchedule("flat_ring", 1, False, 1, 1, 0, (Hop(),))
    with pytest.raises(ValueError, match="flat_ring cannot finish: rank 0 at hop 0"):
        simulate([waits, silent], SIZES, evenly(1.0), outer_only(1e6))
