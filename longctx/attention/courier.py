"""Posts a plan's transfers on a wire, counts their bytes, names step and peer when one fails, keeps a trace.

The trace is a list of Chrome trace events (open it in Perfetto): one row of computation and one per channel
of transfers. A transfer's end is the moment its wait returned, an upper bound.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from longctx.distributed.counters import ByteCounter
from longctx.distributed.wire import PeerLost, Wire
from longctx.schedule import Transfer


class Trace:
    """Chrome trace events of one rank, in microseconds."""

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
        Path(path).write_text(json.dumps({"traceEvents": self.events}))


class Courier:
    """Carries one call's transfers; `label` names the call in errors ("double_ring backward")."""

    def __init__(self, wire: Wire, counter: ByteCounter, label: str, trace: Trace | None = None) -> None:
        self.wire, self.counter, self.label, self.trace = wire, counter, label, trace
        self.pending: dict[int, tuple] = {}

    def post(self, step: int, transfer: Transfer, send: Tensor, recv: Tensor) -> None:
        """Start a transfer; `send` and `recv` must stay untouched until its wait."""
        channel = "heads" if transfer.ring == "heads" else f"{transfer.payload}.{transfer.ring}"
        begin = time.perf_counter()
        try:
            posted = self.wire.post(channel, send, transfer.send.peer, recv, transfer.recv.peer)
        except PeerLost as error:
            raise self._lost(step, transfer, error) from error
        self.counter.add(transfer.send.level, transfer.payload, send.nbytes)
        self.pending[transfer.id] = (posted, transfer, channel, begin)

    def wait(self, step: int, ids: Iterable[int]) -> None:
        for number in ids:
            posted, transfer, channel, begin = self.pending.pop(number)
            try:
                posted.wait()
            except PeerLost as error:
                raise self._lost(step, transfer, error) from error
            if self.trace:
                name = f"{transfer.payload} to {transfer.send.peer}, from {transfer.recv.peer}"
                self.trace.add(channel, name, begin, time.perf_counter())

    @contextmanager
    def span(self, step: int, name: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        if self.trace:
            self.trace.add("compute", f"step {step}: {name}", begin, time.perf_counter())

    def _lost(self, step: int, transfer: Transfer, error: PeerLost) -> PeerLost:
        send, recv = transfer.send, transfer.recv
        return PeerLost(
            f"rank {self.wire.rank}, {self.label}, step {step}: the {transfer.payload} transfer on the "
            f"{transfer.ring} ring failed (block {send.block} to rank {send.peer}, block {recv.block} from "
            f"rank {recv.peer}) while {error}"
        )
