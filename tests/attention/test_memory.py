"""The executor's memory follows the formula of docs/attention.md: buffers exactly, a call's peak within 5 %."""

from __future__ import annotations

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from longctx.attention import ContextParallel, context_attention
from longctx.distributed.thread_transport import ThreadTransport, ThreadWorld
from longctx.topology import Topology

HQ, HKV, D, N = 8, 2, 32, 512  # heads, head dimension, tokens per rank
Q, KV = HQ * D * N * 4, 2 * HKV * D * N * 4  # bytes of fp32 queries and of one KV block (or its gradient)
ROW = HQ * N * 4  # bytes of one lse


class Peak(TorchDispatchMode):
    """Measures the most bytes that operators' results hold at once; `inputs` are not counted."""

    def __init__(self, *inputs: torch.Tensor) -> None:
        super().__init__()
        self.inputs = {x.untyped_storage()._cdata for x in inputs}
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else (result,):
            if isinstance(x, torch.Tensor) and x.device.type != "meta":
                storage = x.untyped_storage()
                if storage._cdata in self.inputs:
                    continue
                self.alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.alive = {key: entry for key, entry in self.alive.items() if not entry[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return result


class Unseen:
    """A transport whose own copies are not counted as the executor's."""

    def __init__(self, transport: ThreadTransport) -> None:
        self.transport, self.rank, self.size = transport, transport.rank, transport.size

    def post(self, *arguments):
        with _disable_current_modes():
            posted = self.transport.post(*arguments)
        wait = posted.wait

        def unseen() -> None:
            with _disable_current_modes():
                wait()

        posted.wait = unseen
        return posted

    def close(self) -> None:
        self.transport.close()


def measure(schedule: str, m: int, w: int) -> tuple[int, int, int, int]:
    """(buffers and peak of forward, buffers and peak of forward then backward), the largest over ranks."""

    def work(transport):
        cp = ContextParallel(Unseen(transport), Topology(m, w), schedule)
        layout = cp.layout(seq_len=N * m * w)
        prepared = layout.cache.prepare(layout.arithmetic.boundaries)
        # Tokens before heads in memory, as a model's projections leave them.
        q, k, v, dout = (torch.randn(1, N, heads, D).transpose(1, 2) for heads in (HQ, HKV, HKV, HQ))
        with Peak(q, k, v) as forward:
            out, lse = prepared.forward(q, k, v, 0.2)
        buffers = cp.pool.total
        cp.pool.clear()
        with Peak(dout, q, k, v, out, lse) as backward:
            prepared.backward(dout, q, k, v, out, lse, 0.2)
        return buffers, forward.peak - buffers, cp.pool.total, backward.peak - cp.pool.total

    return tuple(max(column) for column in zip(*ThreadWorld(m * w).run(work), strict=True))


def kv_buffers(schedule: str, m: int, w: int) -> int:
    """In KV blocks: the packed own one, the foreign ones, and the all-gather's copy in ascending order."""
    if m * w == 1:
        return 0
    if schedule == "flat_ring":
        return 1 + min(2, m * w - 1)
    if schedule == "double_ring":
        return 1 + (3 if m > 2 else 2)
    return 1 + w + (m > 2) + (w - 1)


def dkv_buffers(schedule: str, m: int, w: int) -> int:
    """In blocks of travelling gradient: in flight, arriving, and the sum kept until the inner ring closes."""
    if m * w == 1:
        return 0
    if schedule == "flat_ring":
        return 2
    if schedule == "double_ring":
        return 5 if m > 2 else 3
    return 2 * (w - 1) + (2 if m > 2 else 1)


CASES = [
    ("flat_ring", 1, 1),
    ("flat_ring", 1, 2),
    ("flat_ring", 1, 4),
    ("double_ring", 2, 2),
    ("double_ring", 3, 3),
    ("allgather_ring", 2, 3),
    ("allgather_ring", 3, 3),
]


@pytest.mark.parametrize(("schedule", "m", "w"), CASES)
def test_memory_is_the_formula(schedule, m, w):
    kv, dkv = kv_buffers(schedule, m, w), dkv_buffers(schedule, m, w)
    forward, forward_rest, backward, backward_rest = measure(schedule, m, w)
    assert forward == kv * KV
    assert backward == (kv + dkv) * KV
    if m * w == 1:  # nothing is merged or added: out, lse; then dq, dK, dV
        assert forward_rest == pytest.approx(Q + ROW, rel=0.05)
        assert backward_rest == pytest.approx(Q + KV, rel=0.05)
        return
    blocks = w - 1 if schedule == "allgather_ring" else 1
    assert forward_rest == pytest.approx(2 * Q + 4 * ROW, rel=0.05)
    assert backward_rest == pytest.approx(Q + KV + max(Q + blocks * KV / 2, Q / 2 + blocks * KV), rel=0.05)


def test_batches_of_changing_lengths_keep_the_buffers_of_one() -> None:
    """A set of buffers for every length would grow with every new one, until the group is closed."""

    def work(transport: ThreadTransport) -> list[int]:
        cp = ContextParallel(transport, Topology(1, 2))
        held = []
        for seq_len in (96, 64, 80, 48, 96):
            layout = cp.layout(seq_len)
            q, k = (torch.randn(1, heads, layout.local_len, 16, requires_grad=True) for heads in (4, 2))
            for _ in range(2):  # layers
                out = context_attention(q, k, k, layout)
                assert isinstance(out, torch.Tensor)
                out.sum().backward()
            assert cp.pool.total == sum(x.nbytes for buffers in cp.pool.free.values() for x in buffers)
            held.append(cp.pool.total // layout.local_len)
        return held

    for held in ThreadWorld(2).run(work):
        assert len(set(held)) == 1
