"""The transfers of one attention call: posted on a transport, counted in bytes, and named when one fails.

With a trace, Chrome trace events are recorded too (Perfetto opens them): one row for computations and one for each
channel. A transfer ends in the trace when its wait returns, which is an upper bound.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from longctx.distributed.counters import ByteCounter
from longctx.distributed.transport import PeerLost, Transport
from longctx.schedule import Transfer


class Trace:
    """Collects Chrome trace events of one rank, in microseconds."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.events: list[dict] = []

    def add(self, row: str, name: str, begin: float, end: float) -> None:
        event = {
            "name": name,
            "ph": "X",
            "pid": self.rank,
            "tid": row,
            "ts": begin * 1e6,
            "dur": (end - begin) * 1e6,
        }
        self.events.append(event)

    def write(self, path: str | Path) -> None:
        Path(path).write_text(json.dumps({"traceEvents": self.events}), encoding="utf-8")


class TransferQueue:
    """Posts and awaits the transfers of one call. `label` names the call in errors ("double_ring backward")."""

    def __init__(self, transport: Transport, counter: ByteCounter, label: str, trace: Trace | None = None) -> None:
        self.transport, self.counter, self.label, self.trace = transport, counter, label, trace
        self.pending: dict[int, tuple] = {}

    def post(self, hop: int, transfer: Transfer, send: Tensor, recv: Tensor) -> None:
        """Start a transfer; `send` and `recv` must stay untouched until its wait."""
        channel = "heads" if transfer.channel == "heads" else f"{transfer.payload}.{transfer.channel}"
        begin = time.perf_counter()
        try:
            posted = self.transport.post(channel, send, transfer.send.peer, recv, transfer.recv.peer)
        except PeerLost as error:
            raise self._lost(hop, transfer, error) from error
        self.counter.add(transfer.send.level, transfer.payload, send.nbytes)
        self.pending[transfer.id] = (posted, transfer, channel, begin)

    def wait(self, hop: int, ids: Iterable[int]) -> None:
        for number in ids:
            posted, transfer, channel, begin = self.pending.pop(number)
            try:
                posted.wait()
            except PeerLost as error:
                raise self._lost(hop, transfer, error) from error
            if self.trace:
                name = f"{transfer.payload} to {transfer.send.peer}, from {transfer.recv.peer}"
                self.trace.add(channel, name, begin, time.perf_counter())

    @contextmanager
    def span(self, hop: int, name: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        if self.trace:
            self.trace.add("compute", f"hop {hop}: {name}", begin, time.perf_counter())

    def _lost(self, hop: int, transfer: Transfer, error: PeerLost) -> PeerLost:
        send, recv = transfer.send, transfer.recv
        return PeerLost(
            f"rank {self.transport.rank}, {self.label}, hop {hop}: the {transfer.payload} transfer on the "
            f"{transfer.channel} channel failed (block {send.block} to rank {send.peer}, block {recv.block} from "
            f"rank {recv.peer}) while {error}"
        )
