"""The executor: runs any schedule by posting transfers, calling kernels on rectangles, waiting and merging.

Blockwise attention over a ring is Ring Attention (2310.01889). The executor knows neither rings nor nodes: the schedule
says what to send, and `longctx.layout` says what to compute. The backward needs only q, k, v, out and lse. It receives
the KV blocks again and sends their gradient on in fp32 (by default). Buffers come from a pool that outlives the call.

Shapes: q [B, Hq, L, D], k and v [B, Hkv, L, D], a KV block [2, B, Hkv, L, D], lse [B, Hq, L], where L counts the tokens
of a ring position.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longctx.attention.buffers import BufferPool, GradientSum
from longctx.attention.kernel import Problem
from longctx.attention.kernels import problem_of
from longctx.attention.merge import Accumulator, accumulator_dtype
from longctx.attention.rectangles import Call, Part, RectangleKernels
from longctx.attention.transfers import TransferQueue
from longctx.layout import SequenceLayout
from longctx.schedule import OWN, Compute, RankSchedule


class ScheduleExecutor:
    """Runs the schedule of one call; it holds the transfers under way and the buffers taken from the pool."""

    def __init__(
        self,
        schedule: RankSchedule,
        layout: SequenceLayout,
        transfers: TransferQueue,
        kernels: RectangleKernels,
        pool: BufferPool,
        scale: float,
    ) -> None:
        self.schedule, self.layout, self.transfers, self.kernels, self.pool = schedule, layout, transfers, kernels, pool
        self.scale = scale
        self.position = schedule.rank // schedule.ulysses
        self.lent: list[Tensor] = []
        self.joint: Tensor | None = None  # several blocks in ascending order: one buffer for the whole call

    def _take(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        buffer = self.pool.take(shape, dtype, device)
        self.lent.append(buffer)
        return buffer

    def _blocks(self, k: Tensor, v: Tensor) -> dict[int, Tensor]:
        """The buffers of the KV slots. The own block is packed once, for sending; a single rank packs nothing."""
        if not self.schedule.kv_slots:
            return {}
        self.pool.begin(tuple(k.shape))
        shape = (2, *k.shape)
        blocks = {slot: self._take(shape, k.dtype, k.device) for slot in (OWN, *range(self.schedule.kv_slots))}
        blocks[OWN][0].copy_(k)
        blocks[OWN][1].copy_(v)
        return blocks

    def _keys(self, compute: Compute, blocks: dict[int, Tensor], k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The K and V that a computation reads: one block unchanged, or several copied into ascending order."""
        if len(compute.slots) == 1:
            block = blocks.get(compute.slots[0])
            return (k, v) if block is None else (block[0], block[1])
        length = len(compute.slots) * k.shape[2]
        shape = (2, *k.shape[:2], length, k.shape[3])
        if self.joint is None or self.joint.shape != shape:
            self.joint = self._take(shape, k.dtype, k.device)
        for copy in self.layout.ascending_order(compute.blocks):
            source = blocks[compute.slots[copy.block]][..., copy.source : copy.source + copy.length, :]
            self.joint[..., copy.target : copy.target + copy.length, :].copy_(source)
        return self.joint[0], self.joint[1]

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Compute out, in q's type and strides, and lse for all queries of this rank."""
        blocks = self._blocks(k, v)
        acc = Accumulator(q)
        problem = problem_of(q, k)
        for number, hop in enumerate(self.schedule.ring):
            for transfer in hop.post:
                self.transfers.post(number, transfer, blocks[transfer.send.slot], blocks[transfer.recv.slot])
            compute = hop.compute
            calls = self._calls(compute, problem)
            if compute is not None and (calls or compute.slots == (OWN,)):
                with self.transfers.span(number, f"block {compute.blocks}"):
                    keys, values = self._keys(compute, blocks, k, v) if calls else (k, v)
                    if compute.slots == (OWN,):
                        acc.own([part for call in calls for part in call.forward(q, keys, values, self.scale)])
                    else:
                        for call in calls:
                            self._attend(call, q, keys, values, acc)
            self.transfers.wait(number, hop.wait)
        self._return()
        return acc.result()

    def _attend(self, call: Call, q: Tensor, k: Tensor, v: Tensor, acc: Accumulator) -> None:
        """Merge a call's results; they are freed before the next call's exist."""
        for part in call.forward(q, k, v, self.scale):
            acc.add(*part)

    def _only_call(self, problem: Problem, length: int) -> Call | None:
        """The call that alone serves all tokens of a single rank, and needs neither accumulators nor buffers."""
        if self.schedule.kv_slots or len(self.schedule.ring) != 1:
            return None
        calls = self._calls(self.schedule.ring[0].compute, problem)
        return calls[0] if len(calls) == 1 and calls[0].covers(length) else None

    def _calls(self, compute: Compute | None, problem: Problem) -> list[Call]:
        if compute is None:
            return []
        rects = self.layout.rects(self.position, compute.blocks, compute.part)
        return self.kernels.calls(problem, (compute.blocks, compute.part), rects)

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dkv_dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Compute dq, dk and dv in the accumulators' type, or in the kernel's if one call serves all tokens.

        dkv_dtype: the type in which dKV travels between ranks.
        """
        problem = problem_of(q, k)
        if (only := self._only_call(problem, q.shape[2])) is not None:
            with self.transfers.span(0, "alone"):
                rows, keys = only.backward(dout, q, k, v, out, lse, self.scale)
                return rows[0][1], keys[0][1], keys[0][2]
        blocks = self._blocks(k, v)
        kind = accumulator_dtype(q.dtype)
        dq, *own = (GradientSum(torch.empty_like(x, dtype=kind)) for x in (q, k, v))
        shape = (2, *k.shape)
        travelling = {slot: self._take(shape, dkv_dtype, k.device) for slot in range(self.schedule.dkv_slots)}
        sums = {OWN: own}
        for slot, buffer in travelling.items():
            sums[slot] = [GradientSum(part, begun=True) for part in buffer.unbind(0)]
        for number, hop in enumerate(self.schedule.ring):
            for transfer in hop.post:
                held = blocks if transfer.payload == "kv" else travelling
                self.transfers.post(number, transfer, held[transfer.send.slot], held[transfer.recv.slot])
            compute = hop.compute
            found: list[Part] = []
            calls = self._calls(compute, problem)
            if compute is not None and calls:
                with self.transfers.span(number, f"block {compute.blocks}"):
                    keys, values = self._keys(compute, blocks, k, v)
                    for call in calls:
                        found += self._differentiate(call, dout, q, keys, values, out, lse, dq)
            self.transfers.wait(number, hop.wait)
            if compute is not None:
                self._collect(compute, found, sums)
            for source, target in hop.adds:
                for total, part in zip(sums[target], sums[source], strict=True):
                    total.add(slice(0, k.shape[2]), part.total)
        self._return()
        return dq.settled(), own[0].settled(), own[1].settled()

    def _differentiate(
        self, call: Call, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dq: GradientSum
    ) -> list[Part]:
        """Add the call's dq to `dq`, and return its dK and dV by runs of keys; its own dq is freed on return."""
        rows, found = call.backward(dout, q, k, v, out, lse, self.scale)
        for where, grad in rows:
            dq.add(where, grad)
        return found

    def _collect(self, compute: Compute, found: list[Part], sums: dict[int, list[GradientSum]]) -> None:
        """Add the dK and dV of one hop to their sums, splitting the joint gradient of several blocks by block."""
        targets = [sums[slot] for slot in compute.into]
        if compute.fresh:
            for target in targets:
                for total in target:
                    total.begin()
        for keys, dk, dv in found:
            for index, grad in enumerate((dk, dv)):
                if len(targets) == 1:
                    targets[0][index].add(keys, grad)
                else:
                    self._deal(compute, keys, grad, [target[index] for target in targets])
        for target in targets:
            for total in target:
                total.settled()  # it may be sent, and rows that got nothing are 0

    def _deal(self, compute: Compute, keys: slice, grad: Tensor, targets: list[GradientSum]) -> None:
        for copy in self.layout.ascending_order(compute.blocks):
            first, past = max(copy.target, keys.start), min(copy.target + copy.length, keys.stop)
            if first < past:
                begin = copy.source + first - copy.target
                piece = grad[:, :, first - keys.start : past - keys.start]
                targets[copy.block].add(slice(begin, begin + past - first), piece)

    def _return(self) -> None:
        self.pool.give(self.lent)
        self.lent, self.joint = [], None
