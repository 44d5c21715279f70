"""Schedules of context-parallel attention as plain data: who computes on which KV block and sends what, when.

A `Plan` is the list of steps of one rank. In a step the rank posts transfers, computes on KV blocks that are
already there, waits, and adds up gradients, in that order. One executor runs every plan, the simulator times
it, tests sum its bytes; `longctx.schedule.build` makes it.

Shape of the data::

    Plan.gather / .ring / .scatter : tuples of Step      (gather and scatter only under Ulysses)
    Step.post    : Transfers posted before the computation, in issue order (the same order on every rank)
    Step.compute : Compute on KV `blocks` lying in `slots`, or None
    Step.wait    : ids of the Transfers awaited after the computation
    Step.adds    : (from dKV slot, to dKV slot) sums made after the wait; slot OWN (-1) never leaves home
    Transfer     : payload ("kv", "dkv", "qkv", "out", "saved", "dq", "dkv_heads"), ring (the communicator),
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
Ring = Literal["inner", "outer", "heads"]


@dataclass(frozen=True)
class Message:
    """One direction of a transfer; `block` is the ring position owning the KV (the rank, unless Ulysses)."""

    peer: int
    block: int
    slot: int
    level: Level


@dataclass(frozen=True)
class Transfer:
    """A send and the receive posted together with it; both on the communicator (`ring`, KV or dKV)."""

    id: int
    payload: Payload
    ring: Ring
    send: Message
    recv: Message


@dataclass(frozen=True)
class Compute:
    """Attention of this rank's queries with KV `blocks`; `part` (i, n): the i-th of n shares of the diagonal.

    Backward: block k's gradient goes to dKV slot `into[k]`, replacing it if `fresh`, else added to the
    arrival.
    """

    blocks: tuple[int, ...]
    slots: tuple[int, ...]
    part: tuple[int, int] = (0, 1)
    into: tuple[int, ...] = ()
    fresh: bool = True


@dataclass(frozen=True)
class Step:
    post: tuple[Transfer, ...] = ()
    compute: Compute | None = None
    wait: tuple[int, ...] = ()
    adds: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Sizes:
    """What turns a plan into bytes: per-rank tokens n and head counts before any exchange of heads."""

    tokens: int
    q_heads: int
    kv_heads: int
    head_dim: int
    batch: int = 1
    wire_bytes: int = 2
    grad_bytes: int = 4


@dataclass(frozen=True)
class Plan:
    """The steps of one rank; `kv_slots` and `dkv_slots` count the foreign buffers live at once."""

    schedule: str
    rank: int
    backward: bool
    ulysses: int
    kv_slots: int
    dkv_slots: int
    ring: tuple[Step, ...]
    gather: tuple[Step, ...] = ()
    scatter: tuple[Step, ...] = ()

    @property
    def steps(self) -> tuple[Step, ...]:
        return self.gather + self.ring + self.scatter

    def transfers(self) -> Iterator[Transfer]:
        for step in self.steps:
            yield from step.post

    def bytes(self, sizes: Sizes) -> dict[Level, int]:
        """Bytes this rank sends per link level; the executor's counters must equal it."""
        total: Counter[Level] = Counter({"inner": 0, "outer": 0})
        for transfer in self.transfers():
            total[transfer.send.level] += payload_bytes(transfer.payload, sizes, self.ulysses)
        return dict(total)


def payload_bytes(payload: Payload, sizes: Sizes, ulysses: int = 1) -> int:
    """Bytes of one message (facts: K = n Hkv d, Q = n Hq d, rho = max(1, h / Hkv))."""
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
