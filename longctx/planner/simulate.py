"""Simulates a schedule: computes when every rank computes, sends and waits, given the rates of the links.

The simulator reads the same data as the executor and keeps its order (post, compute, wait, add). A message starts when
both ends have posted it and its sender's link is free; links serve messages in order of arrival. Every rank computes on
its own; ranks that share cores are modelled by longer computations.
"""

from __future__ import annotations

import heapq
from collections import defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from longctx.schedule import Compute, Payload, RankSchedule, Sizes, Transfer, payload_bytes
from longctx.topology import Level, Link

BACKWARD_WORK = 2.5  # five matrix products instead of two


@dataclass(frozen=True)
class Span:
    """An interval of time: a computation of `rank`, or a message from `rank` to `peer`."""

    rank: int
    kind: Literal["compute", "inner", "outer"]
    start: float
    end: float
    hop: int
    blocks: tuple[int, ...]
    payload: Payload | None = None
    peer: int = -1


@dataclass(frozen=True)
class Timeline:
    """All spans of a schedule; `finished` has the time at which each rank is done, `seconds` the last of them."""

    schedule: str
    finished: tuple[float, ...]
    spans: tuple[Span, ...]

    @property
    def ranks(self) -> int:
        return len(self.finished)

    @property
    def seconds(self) -> float:
        return max(self.finished)

    def busy(self, rank: int, kind: str) -> float:
        """Seconds that `rank` spends in spans of one kind."""
        return sum(span.end - span.start for span in self.spans if span.rank == rank and span.kind == kind)

    def exposed(self) -> float:
        """Seconds by which links lengthen the schedule beyond the longest rank's computation."""
        computing = [0.0] * self.ranks
        for span in self.spans:
            computing[span.rank] += span.end - span.start if span.kind == "compute" else 0.0
        return self.seconds - max(computing)


def blocks_of(compute: Compute) -> float:
    """The work of a computation, in KV blocks; a zigzag diagonal costs as much as any other block.

    If a diagonal has n shares, the last has half of its work and the others equal parts of the rest, as in
    longctx.layout.
    """
    i, n = compute.part
    share = 1.0 if n == 1 else 0.5 if i == n - 1 else 0.5 / (n - 1)
    return len(compute.blocks) * share


def evenly(seconds_per_block: float) -> Callable[[int, Compute], float]:
    """A cost function by which every block costs the same on every rank, as in zigzag with one document."""
    return lambda _rank, compute: seconds_per_block * blocks_of(compute)


def simulate(
    schedules: Sequence[RankSchedule],
    sizes: Sizes,
    compute: Callable[[int, Compute], float],
    links: Mapping[Level, Link | None],
    starts: Sequence[float] | None = None,
) -> Timeline:
    """Simulate the schedules of all ranks (rank r's at index r), which start together or at `starts`.

    compute: seconds of one computation of a rank. links: one rank's link per level (None: transfers take no time).
    Raises ValueError when the schedule cannot finish, because a receive has no send or ranks wait for each other.
    """
    clock = _Clock(schedules, sizes, compute, links)
    for rank in range(len(schedules)):
        clock.at(starts[rank] if starts else 0.0, clock.enter, rank)
    while clock.queue:
        now, _, action, arguments = heapq.heappop(clock.queue)
        action(now, *arguments)
    stuck = [rank for rank, schedule in enumerate(schedules) if clock.hop[rank] < len(schedule.hops)]
    if stuck:
        where = ", ".join(f"rank {rank} at hop {clock.hop[rank]}" for rank in stuck[:4])
        raise ValueError(f"schedule={schedules[0].name} cannot finish: {where} wait for messages nobody sends")
    spans = tuple(sorted(clock.spans, key=lambda span: (span.rank, span.start, span.end)))
    return Timeline(schedules[0].name, tuple(clock.finished), spans)


_Lane = tuple[int, int, str, str]  # source, target, channel, payload


@dataclass
class _Clock:
    """The event queue of a simulation and the state of every rank."""

    schedules: Sequence[RankSchedule]
    sizes: Sizes
    compute: Callable[[int, Compute], float]
    links: Mapping[Level, Link | None]
    queue: list = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)
    posted: int = 0

    def __post_init__(self) -> None:
        n = len(self.schedules)
        self.hop = [0] * n
        self.finished = [0.0] * n
        self.computing = [False] * n
        self.halves: dict[tuple[int, int], int] = {}  # (rank, transfer id) -> messages not yet through
        self.sends: dict[_Lane, deque[tuple[int, Transfer]]] = defaultdict(deque)
        self.receives: dict[_Lane, deque[Transfer]] = defaultdict(deque)
        self.free: dict[tuple[int, Level], float] = defaultdict(float)

    def at(self, time: float, action: Callable, *arguments: object) -> None:
        self.posted += 1
        heapq.heappush(self.queue, (time, self.posted, action, arguments))

    def enter(self, now: float, rank: int) -> None:
        """Start the rank's current hop: post its transfers, then compute."""
        hop = self.schedules[rank].hops[self.hop[rank]]
        for transfer in hop.post:
            self.halves[rank, transfer.id] = 2
            name = (transfer.channel, transfer.payload)
            self._match(now, (rank, transfer.send.peer, *name), send=(self.hop[rank], transfer))
            self._match(now, (transfer.recv.peer, rank, *name), receive=transfer)
        end = now
        if hop.compute is not None:
            end += self.compute(rank, hop.compute)
            self.spans.append(Span(rank, "compute", now, end, self.hop[rank], hop.compute.blocks))
        self.computing[rank] = True
        self.at(end, self.computed, rank)

    def computed(self, now: float, rank: int) -> None:
        self.computing[rank] = False
        self._leave(now, rank)

    def _leave(self, now: float, rank: int) -> None:
        """Go on to the next hop if the computation and all awaited transfers of this one are done."""
        hops = self.schedules[rank].hops
        if self.computing[rank] or any(self.halves.get((rank, number), 2) for number in hops[self.hop[rank]].wait):
            return
        self.hop[rank] += 1
        self.finished[rank] = now
        if self.hop[rank] < len(hops):
            self.computing[rank] = True  # no other event may advance the rank before it enters the hop
            self.at(now, self.enter, rank)

    def _match(
        self,
        now: float,
        lane: _Lane,
        send: tuple[int, Transfer] | None = None,
        receive: Transfer | None = None,
    ) -> None:
        """Pair the k-th send of a lane with its k-th receive, and put the pair on the sender's link."""
        sends, receives = self.sends[lane], self.receives[lane]
        if send is not None:
            sends.append(send)
        if receive is not None:
            receives.append(receive)
        if not (sends and receives):
            return
        (hop, sent), received = sends.popleft(), receives.popleft()
        source, target = lane[:2]
        level = sent.send.level
        link = self.links.get(level)
        start = end = now
        if link is not None:
            start = max(now, self.free[source, level])
            end = start + payload_bytes(sent.payload, self.sizes, self.schedules[source].ulysses) / link.bandwidth
            self.free[source, level] = end
            end += link.latency
        blocks = (sent.send.block,)
        self.spans.append(Span(source, level, start, end, hop, blocks, sent.payload, target))
        self.at(end, self.through, source, sent.id, target, received.id)

    def through(self, now: float, source: int, sent: int, target: int, received: int) -> None:
        """Handle the arrival of a message, for which both ends may be waiting."""
        for rank, number in ((source, sent), (target, received)):
            self.halves[rank, number] -= 1
            if self.hop[rank] < len(self.schedules[rank].hops):
                self._leave(now, rank)
