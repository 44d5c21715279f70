"""Schedules of context-parallel attention as plain data: which rank computes on which KV block, and who sends what.

A `RankSchedule` lists the hops of one rank. In each hop the rank posts transfers, computes on KV blocks that have
arrived, waits for transfers, and adds gradients, in that order. One executor runs every schedule, the planner's
simulator times it, and tests sum its bytes. `longctx.schedule.build` makes it.

Shape of the data::

    RankSchedule.gather / .ring / .scatter : tuples of Hop (gather and scatter only under Ulysses)
    Hop.post    : Transfers posted before the computation, in the same order on every rank
    Hop.compute : Compute on KV `blocks` held in `slots`, or None
    Hop.wait    : ids of the Transfers awaited after the computation
    Hop.adds    : (from dKV slot, to dKV slot) sums made after the wait; slot OWN (-1) is this rank's own block
    Transfer    : payload ("kv", "dkv", "qkv", "out", "saved", "dq", "dkv_heads"), channel (its communicator),
                  send and recv Messages: peer rank, block, slot, level of the link
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from longctx.topology import Level

SCHEDULES = ("flat_ring", "double_ring", "allgather_ring", "ulysses_ring")
OWN = -1  # the slot of what belongs to this rank: its own KV block, its own gradient

Payload = Literal["kv", "dkv", "qkv", "out", "saved", "dq", "dkv_heads"]
Channel = Literal["inner", "outer", "heads"]


@dataclass(frozen=True)
class Message:
    """One direction of a transfer.

    block: the ring position that owns the KV (a rank, except under Ulysses). slot: the buffer that holds it.
    """

    peer: int
    block: int
    slot: int
    level: Level


@dataclass(frozen=True)
class Transfer:
    """A send and the receive that is posted with it; payload and channel name the communicator of both."""

    id: int
    payload: Payload
    channel: Channel
    send: Message
    recv: Message


@dataclass(frozen=True)
class Compute:
    """Attention of this rank's queries to KV `blocks`, which lie in `slots`.

    part: (i, n) takes the i-th of n shares of the diagonal. In the backward pass the gradient of block k goes to dKV
    slot `into[k]`: it replaces the slot's content if `fresh`, and is added to it otherwise.
    """

    blocks: tuple[int, ...]
    slots: tuple[int, ...]
    part: tuple[int, int] = (0, 1)
    into: tuple[int, ...] = ()
    fresh: bool = True


@dataclass(frozen=True)
class Hop:
    """One hop of a rank, which posts, computes, waits and adds, in this order."""

    post: tuple[Transfer, ...] = ()
    compute: Compute | None = None
    wait: tuple[int, ...] = ()
    adds: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Sizes:
    """The sizes that turn a schedule into bytes; tokens are a rank's, and heads count before Ulysses exchanges them.

    wire_bytes: bytes of an element of q, k, v or out. grad_bytes: bytes of an element of a travelling dKV.
    """

    tokens: int
    q_heads: int
    kv_heads: int
    head_dim: int
    batch: int = 1
    wire_bytes: int = 2
    grad_bytes: int = 4


@dataclass(frozen=True)
class RankSchedule:
    """The hops of one rank; `kv_slots` and `dkv_slots` count the buffers of foreign blocks that are live at once."""

    name: str
    rank: int
    backward: bool
    ulysses: int
    kv_slots: int
    dkv_slots: int
    ring: tuple[Hop, ...]
    gather: tuple[Hop, ...] = ()
    scatter: tuple[Hop, ...] = ()

    @property
    def hops(self) -> tuple[Hop, ...]:
        return self.gather + self.ring + self.scatter

    def transfers(self) -> Iterator[Transfer]:
        for hop in self.hops:
            yield from hop.post

    def bytes(self, sizes: Sizes) -> dict[Level, int]:
        """Bytes that this rank sends over each level of links; tests compare the executor's counters with them."""
        total: Counter[Level] = Counter({"inner": 0, "outer": 0})
        for transfer in self.transfers():
            total[transfer.send.level] += payload_bytes(transfer.payload, sizes, self.ulysses)
        return dict(total)


def payload_bytes(payload: Payload, sizes: Sizes, ulysses: int = 1) -> int:
    """Bytes of one message; under Ulysses with h ranks, h kv heads travel if a layer has fewer than h."""
    per_head = sizes.batch * sizes.tokens * sizes.head_dim
    q = per_head * sizes.q_heads
    kv = 2 * per_head * max(sizes.kv_heads, ulysses if ulysses > 1 else 0)
    b, g = sizes.wire_bytes, sizes.grad_bytes
    return {
        "kv": kv * b,
        "dkv": kv * g,
        "qkv": (q + kv) * b // ulysses,
        "out": q * b // ulysses,
        "saved": (3 * q + kv) * b // ulysses,
        "dq": q * b // ulysses,
        "dkv_heads": kv * g // ulysses,
    }[payload]
