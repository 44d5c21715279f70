"""NCCL's rules, checked by a wire: no tags, one order of communicators on all ranks, every rank in a group's batches.

gloo and threads forgive what NCCL does not: a transfer that pairs by luck, a rank that posts in another order, a group
whose first batch lacks a rank. The wire records every post, and `check` compares the records of all ranks.
"""

from __future__ import annotations

import time

import pytest
import torch

from longctx.attention import ContextParallel, context_attention
from longctx.distributed.thread_transport import ThreadTransport, ThreadWorld
from longctx.topology import Topology

DOCUMENTS = {
    "one": None,
    "short": list(range(0, 97, 4)),  # most pairs of ranks share nothing
    "uneven": [0, 50, 51, 52, 60, 96],
}


class Wire:
    """A thread's transport that records (channel, to, source, bytes sent, bytes received) of every post in order."""

    def __init__(self, transport: ThreadTransport) -> None:
        self.transport, self.rank, self.size = transport, transport.rank, transport.size
        self.posts: list[tuple[str, int, int, int, int]] = []
        self.busy: set[int] = set()

    def post(self, channel, send, to, recv, source):
        assert to != self.rank
        assert source != self.rank
        assert send.is_contiguous()
        assert recv.is_contiguous()
        assert recv.data_ptr() not in self.busy, "a buffer is received into twice before its wait"
        assert send.data_ptr() != recv.data_ptr()
        self.posts.append((channel, to, source, send.nbytes, recv.nbytes))
        self.busy.add(recv.data_ptr())
        pending = self.transport.post(channel, send, to, recv, source)
        wait = pending.wait

        def waited():
            wait()
            self.busy.discard(recv.data_ptr())

        pending.wait = waited
        return pending

    def all_gather(self, tensor):
        return self.transport.all_gather(tensor)

    def unsupported(self, device):
        return None

    def close(self):
        assert not self.busy, "a transfer was posted and never awaited"


def check(wires: list[Wire]) -> None:
    """Compare the records of all ranks of a group, which are in rank order."""
    orders = [[post[0] for post in wire.posts] for wire in wires]
    assert all(order == orders[0] for order in orders), "ranks post to communicators in different orders"
    for channel in dict.fromkeys(orders[0]):
        batches = [[post for post in wire.posts if post[0] == channel] for wire in wires]
        for number, batch in enumerate(zip(*batches, strict=True)):  # the number-th batch of every rank
            for rank, (_, to, source, sent, received) in enumerate(batch):
                assert batch[to][2] == rank, f"{channel} {number}: rank {to} does not receive from {rank} in this batch"
                assert batch[source][1] == rank, f"{channel} {number}: rank {source} does not send to {rank}"
                assert batch[to][4] == sent, f"{channel} {number}: rank {to} expects another size"
                assert batch[source][3] == received


def run(nodes, ranks, schedule, documents, ulysses=None, kind="zigzag") -> list[Wire]:
    def work(transport):
        wire = Wire(transport)
        cp = ContextParallel(wire, Topology(nodes, ranks), schedule, ulysses=ulysses)
        layout = cp.layout(seq_len=96, documents=documents, kind=kind)
        q, k, v = (torch.randn(1, heads, layout.local_len, 4, requires_grad=True) for heads in (4, 2, 2))
        context_attention(q, k, v, layout).sum().backward()
        cp.close()
        return wire

    return ThreadWorld(nodes * ranks).run(work)


@pytest.mark.parametrize("documents", DOCUMENTS.values(), ids=DOCUMENTS.keys())
@pytest.mark.parametrize(
    ("nodes", "ranks", "schedule", "ulysses"),
    [(1, 2, "flat_ring", None), (1, 4, "flat_ring", None), (2, 2, "double_ring", None), (3, 2, "double_ring", None),
     (2, 3, "allgather_ring", None), (3, 2, "allgather_ring", None), (2, 2, "ulysses_ring", 2),
     (1, 4, "ulysses_ring", 4)],
)  # fmt: skip
def test_every_schedule_keeps_the_rules(nodes, ranks, schedule, ulysses, documents):
    wires = run(nodes, ranks, schedule, documents, ulysses)
    check(wires)
    # Of the short documents no rank needs another's keys; ulysses_ring trades heads all the same.
    assert all(wire.posts for wire in wires) == (documents is not DOCUMENTS["short"] or schedule == "ulysses_ring")


@pytest.mark.parametrize("kind", ["contiguous", "documents"])
def test_every_layout_keeps_the_rules(kind):
    wires = run(2, 2, "double_ring", DOCUMENTS["uneven"], kind=kind)
    check(wires)
    assert [len(wire.posts) for wire in wires] == [9] * 4


def test_the_wire_notices():
    wires = run(1, 4, "flat_ring", None)
    first = wires[1].posts
    wires[1].posts = [first[-1], *first[1:-1], first[0]]
    with pytest.raises(AssertionError, match=r"different orders|does not"):
        check(wires)
    wires[1].posts = first[:-1]
    with pytest.raises(AssertionError):
        check(wires)
    wires[1].posts = [(channel, to, source, sent + 8, received) for channel, to, source, sent, received in first]
    with pytest.raises(AssertionError, match="another size"):
        check(wires)


def test_a_virtual_rank_that_fails_is_named_and_leaves_nothing_behind():
    """Its peers, which wait for its block, end at once; the next call meets no tensor of this one."""
    world = ThreadWorld(3, serial=True)

    def fails(transport: ThreadTransport) -> None:
        if transport.rank == 1:
            raise RuntimeError("out of memory")
        other = (transport.rank + 1) % 3
        transport.post("kv", torch.ones(2), other, torch.zeros(2), 1).wait()

    def works(transport: ThreadTransport) -> float:
        to, source, got = (transport.rank + 1) % 3, (transport.rank - 1) % 3, torch.zeros(1)
        transport.post("kv", torch.full((1,), float(transport.rank)), to, got, source).wait()
        return float(got)

    began = time.monotonic()
    with pytest.raises(RuntimeError, match="out of memory"):
        world.run(fails)
    assert time.monotonic() - began < world.timeout / 2
    assert world.run(works) == [2.0, 0.0, 1.0]
