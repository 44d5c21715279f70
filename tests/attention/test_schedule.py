"""Schedules, simulated on all ranks together: every block meets every query, and every gradient returns home."""

from __future__ import annotations

from collections import Counter, deque

import numpy as np
import pytest

from longctx.layout import SequenceLayout
from longctx.schedule import OWN, SCHEDULES, RankSchedule, Sizes, build
from longctx.topology import Topology

GRIDS = [(m, w) for m in (1, 2, 3, 4) for w in (1, 2, 3, 4)]


def schedules(schedule: str, topology: Topology, backward: bool, work=None, ulysses=None) -> list[RankSchedule]:
    ranks = range(topology.size)
    return [build(schedule, topology, r, backward=backward, ulysses=ulysses, work=work) for r in ranks]


class Machine:
    """All ranks' ring hops on symbols: a KV buffer holds its owner, a dKV buffer the ranks that added."""

    def __init__(self, every: list[RankSchedule]) -> None:
        self.every = every
        h = every[0].ulysses
        self.kv = [{OWN: schedule.rank // h} for schedule in every]
        self.dkv = [{OWN: Counter()} for _ in every]
        self.met = [Counter() for _ in every]
        self.wires: dict[tuple, deque] = {}
        self.waiting = [{} for _ in every]

    def run(self) -> None:
        for number in range(len(self.every[0].ring)):
            for r, schedule in enumerate(self.every):
                for t in schedule.ring[number].post:
                    held = self.kv if t.payload == "kv" else self.dkv
                    content = held[r][t.send.slot]
                    content = content if t.payload == "kv" else Counter(content)
                    box = self.wires.setdefault((r, t.send.peer, t.payload, t.channel), deque())
                    box.append((t.send.block, content))
                    self.waiting[r][t.id] = t
            for r, schedule in enumerate(self.every):
                self.finish(r, schedule.ring[number])

    def finish(self, r: int, step) -> None:
        compute = step.compute
        if compute:
            for block, slot in zip(compute.blocks, compute.slots, strict=True):
                assert self.kv[r][slot] == block, "the wrong block lies in the slot"
                self.met[r][block] += 1 / compute.part[1]
        for number in step.wait:
            t = self.waiting[r].pop(number)
            block, content = self.wires[t.recv.peer, r, t.payload, t.channel].popleft()
            assert block == t.recv.block, "messages are mis-paired"
            (self.kv if t.payload == "kv" else self.dkv)[r][t.recv.slot] = content
        if compute and compute.into:
            for block, slot in zip(compute.blocks, compute.into, strict=True):
                if compute.fresh:
                    self.dkv[r][slot] = Counter()
                self.dkv[r][slot][block, r] += 1 / compute.part[1]
        for source, target in step.adds:
            self.dkv[r][target].update(self.dkv[r][source])


def pairs_met(machine: Machine) -> set[tuple[int, int]]:
    h = machine.every[0].ulysses
    return {(r // h, block) for r, met in enumerate(machine.met) for block in met}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("m", "w"), GRIDS)
@pytest.mark.parametrize("backward", [False, True])
def test_every_block_meets_every_rank_and_every_gradient_comes_home(schedule, m, w, backward):
    every = schedules(schedule, Topology(m, w), backward)
    machine = Machine(every)
    machine.run()
    assert not any(machine.waiting), "a transfer is never awaited"
    assert not any(machine.wires.values()), "a message is never received"
    h = every[0].ulysses
    positions = m * w // h
    for r in range(m * w):
        assert machine.met[r] == {block: pytest.approx(1) for block in range(positions)}
        if backward:
            mine, u = r // h, r % h
            want = {(mine, p * h + u): pytest.approx(1) for p in range(positions)}
            assert machine.dkv[r][OWN] == want


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("m", "w"), [(1, 4), (2, 2), (2, 4), (4, 2), (3, 3)])
@pytest.mark.parametrize("documents", ["short", "some", "one"])
def test_packed_documents_visit_only_offsets_with_work(schedule, m, w, documents):
    topology = Topology(m, w)
    h = w if schedule == "ulysses_ring" else 1
    n, size = m * w // h, 48 * m * w
    rng = np.random.default_rng(m * 10 + w)
    inner = {
        "short": range(5, size, 7),
        "some": sorted(rng.choice(np.arange(1, size), 4, replace=False)),
        "one": (),
    }
    boundaries = np.array([0, *inner[documents], size])
    layout = SequenceLayout(size, n, boundaries=boundaries, ulysses=h)
    for backward in (False, True):
        machine = Machine(schedules(schedule, topology, backward, layout.work))
        machine.run()
        needed = {(int(i), int(j)) for i, j in zip(*np.nonzero(layout.work), strict=True)}
        assert needed <= pairs_met(machine)
        if backward:
            for i, j in needed:
                for u in range(h):
                    assert machine.dkv[j * h + u][OWN][j, i * h + u] == pytest.approx(1)
        hops = len({(i - j) % n for i, j in needed} - {0})
        if schedule == "flat_ring":
            kv = [t for t in machine.every[0].transfers() if t.payload == "kv"]
            assert len(kv) == hops
            assert len([t for t in machine.every[0].transfers() if t.payload == "dkv"]) == (hops if backward else 0)
    if documents == "short" and schedule == "flat_ring":
        assert hops <= 2


SIZES = Sizes(tokens=96, q_heads=8, kv_heads=2, head_dim=16, batch=3, wire_bytes=2, grad_bytes=4)
K = 3 * 96 * 2 * 16
Q = 3 * 96 * 8 * 16


@pytest.mark.parametrize(("m", "w"), GRIDS)
def test_bytes_are_the_formulas(m, w):
    n, b, g = m * w, 2, 4
    for rank in range(n):
        topology = Topology(m, w)
        last = rank % w == w - 1 and m > 1
        for schedule in SCHEDULES[:3]:
            forward = build(schedule, topology, rank).bytes(SIZES)
            backward = build(schedule, topology, rank, backward=True).bytes(SIZES)
            if schedule == "flat_ring":
                hops = {"inner": 0 if last else n - 1, "outer": n - 1 if last else 0}
            else:
                hops = {"inner": m * (w - 1), "outer": m - 1}
            assert forward == {level: count * 2 * K * b for level, count in hops.items()}
            assert backward == {level: count * 2 * K * (b + g) for level, count in hops.items()}


@pytest.mark.parametrize("h", [2, 4, 8])
def test_bytes_of_ulysses_are_the_formulas(h):
    topology, b, g = Topology(2, 8), 2, 4
    rho = max(1, h / SIZES.kv_heads)
    ring = 16 / h - 1
    forward = build("ulysses_ring", topology, 3, ulysses=h).bytes(SIZES)
    backward = build("ulysses_ring", topology, 3, ulysses=h, backward=True).bytes(SIZES)
    heads = (h - 1) / h
    assert sum(forward.values()) == heads * (2 * Q + 2 * rho * K) * b + ring * 2 * rho * K * b
    exchanged = heads * ((4 * Q + 2 * rho * K) * b + 2 * rho * K * g)
    assert sum(backward.values()) == exchanged + ring * 2 * rho * K * (b + g)


@pytest.mark.parametrize(("m", "w"), [(2, 4), (3, 4), (4, 4), (8, 8)])
def test_buffers_stay_few(m, w):
    topology = Topology(m, w)
    for backward in (False, True):
        assert build("flat_ring", topology, 0, backward=backward).kv_slots == 2
        assert build("double_ring", topology, 0, backward=backward).kv_slots <= 3
        assert build("allgather_ring", topology, 0, backward=backward).kv_slots == w + (m > 2)
    assert build("flat_ring", topology, 0, backward=True).dkv_slots == 2
    assert build("double_ring", topology, 0, backward=True).dkv_slots <= 5


@pytest.mark.parametrize("schedule", ["double_ring", "allgather_ring"])
def test_the_outer_transfer_spans_the_inner_ring(schedule):
    for backward in (False, True):
        ring = build(schedule, Topology(3, 4), 5, backward=backward).ring
        posted = {t.id: i for i, s in enumerate(ring) for t in s.post if t.channel == "outer" and t.payload == "kv"}
        awaited = {number: i for i, s in enumerate(ring) for number in s.wait}
        inner = 3 if schedule == "double_ring" else 1
        assert [awaited[number] - step for number, step in posted.items()] == [inner] * 2


def test_the_homing_hop_hides_behind_the_diagonal():
    for schedule in SCHEDULES[:3]:
        ring = build(schedule, Topology(2, 2), 0, backward=True).ring
        last = ring[-1]
        assert last.adds[-1][1] == OWN
        assert last.compute is not None
        assert last.compute.blocks == (0,)
        assert last.compute.part[0] == last.compute.part[1] - 1


def test_every_rank_posts_in_the_same_order():
    for schedule in SCHEDULES:
        every = schedules(schedule, Topology(2, 4), True)
        orders = {tuple((i, t.payload, t.channel) for i, s in enumerate(p.hops) for t in s.post) for p in every}
        assert len(orders) == 1


def test_bad_schedules_are_named():
    with pytest.raises(ValueError, match="schedule='spiral'"):
        build("spiral", Topology(1, 2), 0)
    with pytest.raises(ValueError, match="ulysses=3 does not divide the 4 ranks"):
        build("ulysses_ring", Topology(1, 4), 0, ulysses=3)
    with pytest.raises(ValueError, match="work has shape"):
        build("flat_ring", Topology(1, 4), 0, work=np.ones((3, 3), bool))
