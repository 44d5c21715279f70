"""Builds every schedule: a flat ring is a double ring with a single group.

Sources: Ring Attention (2310.01889), the double ring of BurstAttention (2403.09347), Ulysses x ring as in USP
(2405.07719). An outer ring runs over `grid[0]` groups and an inner ring (or an all-gather) over the `grid[1]` members
of each; positions are numbered group by group. The backward departs from public implementations: a rank's contribution
to its own block is never sent, and a block's gradient travels only between the ranks that add to it. dKV so makes N-1
hops (flat), or M(W-1) inner and M-1 outer hops (double), instead of N or MW. Outer KV comes directly from its owner, so
three foreign blocks are live instead of four.

The backward pass of a flat ring of four ranks, on every rank (own: its own block; slots of foreign KV and of dKV):

| hop | sends and receives | computes | afterwards |
|---|---|---|---|
| 0 | KV: own -> slot 0 | the first share of the own block | |
| 1 | KV: slot 0 -> slot 1 | slot 0, dKV into slot 0, fresh | |
| 2 | KV: slot 1 -> slot 0; dKV: slot 0 -> slot 1 | slot 1, dKV added to what came into slot 1 | |
| 3 | dKV: slot 1 -> slot 0 | slot 0, dKV added to what came into slot 0 | |
| 4 | dKV: slot 0 -> slot 1 | the second share of the own block | slot 1 is added to the own dKV |
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np

from longctx.schedule.hops import OWN, SCHEDULES, Channel, Compute, Hop, Message, Payload, RankSchedule, Transfer
from longctx.topology import Topology

# The ids of a schedule's transfers: those that gather heads begin at 0, those of the ring and of the scatter here.
RING_IDS, SCATTER_IDS = 10**6, 10**9


def build(
    schedule: str,
    topology: Topology,
    rank: int,
    *,
    backward: bool = False,
    ulysses: int | None = None,
    work: np.ndarray | None = None,
) -> RankSchedule:
    """Build the schedule of `rank`.

    `work[i, j]` says whether queries of ring position i attend to KV of position j (None: always). The ring skips
    offsets at which no pair does. `ulysses` counts the ranks that split heads (default: all ranks of a node).
    Raises ValueError for an unknown schedule and for an `ulysses` that does not divide the ranks of a node.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule={schedule!r} is not one of {', '.join(SCHEDULES)}")
    h = (ulysses or topology.ranks) if schedule == "ulysses_ring" else 1
    if topology.ranks % h:
        raise ValueError(f"ulysses={h} does not divide the {topology.ranks} ranks of a node")
    positions = topology.size // h
    nested = schedule in ("double_ring", "allgather_ring")
    grid = (topology.nodes, topology.ranks) if nested else (1, positions)
    ring = _Builder(topology, rank, h, grid, schedule == "allgather_ring", work)
    return replace(
        ring.build(backward),
        name=schedule,
        gather=_heads(topology, rank, h, backward, True),
        scatter=_heads(topology, rank, h, backward, False),
    )


@lru_cache(maxsize=64)
def build_all(
    schedule: str, topology: Topology, *, backward: bool = False, ulysses: int | None = None
) -> tuple[RankSchedule, ...]:
    """Build the schedules of all ranks, rank r's at index r; those of a topology are built once in a process."""
    return tuple(build(schedule, topology, rank, backward=backward, ulysses=ulysses) for rank in range(topology.size))


def _heads(topology: Topology, rank: int, h: int, backward: bool, gather: bool) -> tuple[Hop, ...]:
    """The all-to-all exchanges of Ulysses (2309.14509) as pairwise transfers, one hop per payload."""
    if h == 1:
        return ()
    payloads: tuple[Payload, ...] = (
        (("saved",) if backward else ("qkv",)) if gather else (("dq", "dkv_heads") if backward else ("out",))
    )
    base, u = rank - rank % h, rank % h
    hops, number = [], (0 if gather else SCATTER_IDS)
    for payload in payloads:
        post = []
        for delta in range(1, h):
            to, source = base + (u + delta) % h, base + (u - delta) % h
            send = Message(to, base // h, delta, topology.level(rank, to))
            recv = Message(source, base // h, delta, topology.level(rank, source))
            post.append(Transfer(number + len(post), payload, "heads", send, recv))
        number += h
        hops.append(Hop(post=tuple(post), wait=tuple(t.id for t in post)))
    return tuple(hops)


# The name of a buffer while hops are drafted: OWN, or what it holds, with the offsets of its block, a groups and b
# members. KV: ("outer", a) from the block's owner, ("inner", a, b) from within the group. dKV: ("travel", a, b) on
# its way through the inner ring, ("close", ...) at its end, ("sum", a) of a group's visit, ("relay", a) another
# group's sum, ("home",) the sum of all foreign groups back at the owner.
Buffer = int | tuple[str | int, ...]


class _End(NamedTuple):
    """One direction of a drafted transfer: the peer's ring position, the block, and the buffer that holds it."""

    position: int
    block: int
    buffer: Buffer


class _Move(NamedTuple):
    """A drafted Transfer."""

    number: int
    payload: Payload
    channel: Channel
    send: _End
    recv: _End


class _Work(NamedTuple):
    """A drafted Compute: blocks in KV buffers, and the dKV buffers into which their gradients go."""

    blocks: tuple[int, ...]
    buffers: tuple[Buffer, ...]
    into: tuple[Buffer, ...]
    fresh: bool
    part: tuple[int, int] = (0, 1)


@dataclass
class _Draft:
    """A hop under construction, whose slots are still named buffers."""

    post: list[_Move] = field(default_factory=list)
    compute: _Work | None = None
    wait: list[int] = field(default_factory=list)
    adds: list[tuple[Buffer, Buffer]] = field(default_factory=list)


class _Builder:
    """Drafts the hops with named buffers, then assigns buffers to slots by their lifetimes."""

    def __init__(self, topology: Topology, rank: int, h: int, grid: tuple[int, int], allgather: bool, work) -> None:
        self.topology, self.rank, self.h, self.grid, self.allgather = topology, rank, h, grid, allgather
        self.m, self.w = divmod(rank // h, grid[1])
        self.visits = _visits(grid, work)
        self.hops: list[_Draft] = []
        self.count = RING_IDS
        self.starts: list[int] = []  # per visit: index of its first hop

    def position(self, a: int, b: int) -> int:
        """The ring position `a` groups and `b` members behind this one (negative: ahead)."""
        return (self.m - a) % self.grid[0] * self.grid[1] + (self.w - b) % self.grid[1]

    def exchange(self, hop: int, payload: Payload, channel: Channel, send: _End, recv: _End) -> int:
        """Post a transfer at `hop`; returns its number."""
        self._until(hop)
        self.count += 1
        self.hops[hop].post.append(_Move(self.count, payload, channel, send, recv))
        return self.count

    def build(self, backward: bool) -> RankSchedule:
        self._forward()
        if backward:
            self._backward()
        kv = _numbers(self.hops, "kv")
        own: dict[Buffer, int] = {OWN: OWN}
        dkv = _numbers(self.hops, "dkv") if backward else own
        ring = tuple(self._freeze(hop, kv, dkv, backward) for hop in self.hops)
        return RankSchedule("", self.rank, backward, self.h, _size(kv), _size(dkv), ring)

    def _forward(self) -> None:
        """Draft the hops of KV: outer transfers come from the owner, posted before the inner ring, awaited after it."""
        for k, (a, members) in enumerate(self.visits):
            first = len(self.hops)
            self.starts.append(first)
            held = OWN if a == 0 else ("outer", a)
            block = self.position(a, 0)
            self.hops.append(_Draft(compute=_Work((block,), (held,), (("sum", a) if a else OWN,), fresh=a > 0)))
            outer = None
            if k + 1 < len(self.visits):
                after = self.visits[k + 1][0]
                send = _End(self.position(-after, 0), self.position(0, 0), OWN)
                recv = _End(self.position(after, 0), self.position(after, 0), ("outer", after))
                outer = self.exchange(first, "kv", "outer", send, recv)
            self._all_gather(a, members, held) if self.allgather else self._inner_ring(a, members, held)
            if outer is not None:
                self.hops[-1].wait.append(outer)

    def _inner_ring(self, a: int, members: list[int], held) -> None:
        """Draft one inner ring: the block goes on to the next member that has work for it."""
        before = 0
        for b in members:
            now, distance = len(self.hops) - 1, b - before
            send = _End(self.position(0, -distance), self.position(a, before), held)
            held = ("inner", a, b)
            recv = _End(self.position(0, distance), self.position(a, b), held)
            self.hops[now].wait.append(self.exchange(now, "kv", "inner", send, recv))
            work = _Work((self.position(a, b),), (held,), (("travel", a, b),), fresh=before == 0)
            self.hops.append(_Draft(compute=work))
            before = b

    def _all_gather(self, a: int, members: list[int], held) -> None:
        """Draft one all-gather inside the group, and one computation on all gathered blocks."""
        if not members:
            return
        now = len(self.hops) - 1
        for b in members:
            send = _End(self.position(0, -b), self.position(a, 0), held)
            recv = _End(self.position(0, b), self.position(a, b), ("inner", a, b))
            self.hops[now].wait.append(self.exchange(now, "kv", "inner", send, recv))
        blocks = tuple(self.position(a, b) for b in members)
        names = tuple(("inner", a, b) for b in members)
        self.hops.append(_Draft(compute=_Work(blocks, names, tuple(("travel", a, b) for b in members), fresh=True)))

    def _backward(self) -> None:
        """Draft the hops of dKV, which follow the KV.

        The inner sum of a block ends at the rank that received the block from its owner; from there the outer
        transfers carry it to the other groups and to its owner.
        """
        computed = len(self.hops)
        ready = -1  # hop after which the previous visit's sum is complete
        previous = None
        for k, (a, members) in enumerate(self.visits):
            last = (self.starts[k + 1] if k + 1 < len(self.visits) else computed) - 1
            done = self._close(a, members, self.starts[k], last)
            if a == 0:
                continue
            if previous is not None:
                post, distance = ready + 1, a - previous
                send = _End(self.position(-distance, 0), self.position(previous, 0), ("sum", previous))
                recv = _End(self.position(distance, 0), self.position(a, 0), ("relay", a))
                number = self.exchange(post, "dkv", "outer", send, recv)
                wait = max(post, last)
                self.hops[wait].wait.append(number)
                self.hops[wait].adds.append((("relay", a), ("sum", a)))
                done = max(done, wait)
            ready, previous = done, a
        if previous is not None:
            send = _End(self.position(previous, 0), self.position(previous, 0), ("sum", previous))
            recv = _End(self.position(-previous, 0), self.position(0, 0), ("home",))
            number = self.exchange(ready + 1, "dkv", "outer", send, recv)
            self.hops[ready + 1].wait.append(number)
            self.hops[ready + 1].adds.append((("home",), OWN))
        self._split_diagonal(computed)

    def _close(self, a: int, members: list[int], start: int, last: int) -> int:
        """Draft the inner dKV hops of one visit; returns the hop after which the visit's sum is complete."""
        target = ("sum", a) if a else OWN
        if not members:
            return start
        if self.allgather:
            for b in members:
                send = _End(self.position(0, b), self.position(a, b), ("travel", a, b))
                recv = _End(self.position(0, -b), self.position(a, 0), ("close", a, b))
                number = self.exchange(last + 1, "dkv", "inner", send, recv)
                self.hops[last + 1].wait.append(number)
                self.hops[last + 1].adds.append((("close", a, b), target))
            return last + 1
        for i, b in enumerate(members[1:], start=1):
            before, hop = members[i - 1], start + 1 + i
            send = _End(self.position(0, before - b), self.position(a, before), ("travel", a, before))
            recv = _End(self.position(0, b - before), self.position(a, b), ("travel", a, b))
            self.hops[hop].wait.append(self.exchange(hop, "dkv", "inner", send, recv))
        b = members[-1]
        send = _End(self.position(0, b), self.position(a, b), ("travel", a, b))
        recv = _End(self.position(0, -b), self.position(a, 0), ("close", a))
        number = self.exchange(last + 1, "dkv", "inner", send, recv)
        self.hops[last + 1].wait.append(number)
        self.hops[last + 1].adds.append((("close", a), target))
        return last + 1

    def _until(self, hop: int) -> None:
        while len(self.hops) <= hop:
            self.hops.append(_Draft())

    def _split_diagonal(self, computed: int) -> None:
        """Give each of the last two hops a share of the diagonal block, so that its transfers overlap with work."""
        tail = list(range(computed, len(self.hops)))[-2:]
        shares = len(tail) + 1
        diagonal = self.hops[0].compute
        assert diagonal is not None
        for i, hop in enumerate([0, *tail]):
            self.hops[hop].compute = diagonal._replace(part=(i, shares))

    def _freeze(self, hop: _Draft, kv: dict[Buffer, int], dkv: dict[Buffer, int], backward: bool) -> Hop:
        post = []
        for move in hop.post:
            slots = kv if move.payload == "kv" else dkv
            messages = []
            for end in (move.send, move.recv):
                peer = end.position * self.h + self.rank % self.h
                messages.append(Message(peer, end.block, slots[end.buffer], self.topology.level(self.rank, peer)))
            post.append(Transfer(move.number, move.payload, move.channel, *messages))
        compute = None
        if (work := hop.compute) is not None:
            targets = tuple(dkv[name] for name in work.into) if backward else ()
            compute = Compute(work.blocks, tuple(kv[name] for name in work.buffers), work.part, targets, work.fresh)
        adds = tuple((dkv[a], dkv[b]) for a, b in hop.adds)
        return Hop(tuple(post), compute, tuple(hop.wait), adds)


def _visits(grid: tuple[int, int], work: np.ndarray | None) -> list[tuple[int, list[int]]]:
    """The group offsets to visit, each with its member offsets > 0, own group first; the same on every rank."""
    groups, members = grid
    if work is not None and work.shape != (groups * members, groups * members):
        raise ValueError(f"work has shape {work.shape}, expected {(groups * members,) * 2}")
    visits: list[tuple[int, list[int]]] = []
    m, w = np.divmod(np.arange(groups * members), members)
    for a in range(groups):
        busy = [
            b
            for b in range(members)
            if work is None or work[m * members + w, (m - a) % groups * members + (w - b) % members].any()
        ]
        if a == 0 or busy:
            visits.append((a, [b for b in busy if b]))
    return visits


def _numbers(hops: list[_Draft], kind: Literal["kv", "dkv"]) -> dict[Buffer, int]:
    """Assign the named buffers to slots: buffers whose lifetimes (in hops) overlap never share a slot."""
    mine = {
        move.number: (move.send.buffer, move.recv.buffer) for hop in hops for move in hop.post if move.payload == kind
    }
    life: dict[Buffer, tuple[int, int]] = {}
    for index, hop in enumerate(hops):
        moved = [move.number for move in hop.post] + hop.wait
        used = [name for number in moved if number in mine for name in mine[number]]
        if hop.compute is not None:
            used += hop.compute.buffers if kind == "kv" else hop.compute.into
        if kind == "dkv":
            used += [name for pair in hop.adds for name in pair]
        for name in used:
            start, _ = life.get(name, (index, index))
            life[name] = (start, index)
    numbers: dict[Buffer, int] = {OWN: OWN}
    free_at: list[int] = []  # per slot: the last hop of its present buffer
    for name, (start, end) in sorted(life.items(), key=lambda item: item[1][0]):
        if name == OWN:
            continue
        slot = next((s for s, until in enumerate(free_at) if until < start), len(free_at))
        if slot == len(free_at):
            free_at.append(end)
        free_at[slot] = end
        numbers[name] = slot
    return numbers


def _size(numbers: dict[Buffer, int]) -> int:
    return max(numbers.values()) + 1
