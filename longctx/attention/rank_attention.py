"""The attention of one rank under one layout: gather heads (under Ulysses), run the executor, scatter the results."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
import torch
from torch import Tensor

from longctx.attention import op
from longctx.attention.executor import ScheduleExecutor
from longctx.attention.group import AttentionGroup
from longctx.attention.kernels import choose, problem_of
from longctx.attention.merge import accumulator_dtype, like
from longctx.attention.rectangles import RectangleKernels
from longctx.attention.transfers import TransferQueue
from longctx.attention.ulysses import Heads, gather, scatter
from longctx.layout import LayoutKind, SequenceLayout
from longctx.schedule import RankSchedule, build

LAYOUTS_KEPT = 16  # layouts in the cache of one (seq_len, kind)


class RankAttention:
    """Runs attention on one rank; holds the forward and backward schedules of one SequenceLayout."""

    def __init__(self, cp: AttentionGroup, layout: SequenceLayout) -> None:
        self.cp, self.layout = cp, layout
        self.kernels = RectangleKernels(cp.kernel, recurring=len(layout.boundaries) == 2)
        self.schedules = tuple(
            build(
                cp.schedule,
                cp.topology,
                cp.rank,
                backward=backward,
                ulysses=cp.ulysses if cp.schedule == "ulysses_ring" else None,
                work=layout.work,
            )
            for backward in (False, True)
        )

    def _executor(self, schedule: RankSchedule, q: Tensor, k: Tensor, scale: float) -> ScheduleExecutor:
        choose(problem_of(q, k), self.cp.kernel)  # a kernel that cannot serve is named before anything is sent
        transfers = TransferQueue(
            self.cp.transport,
            self.cp.bytes,
            f"{schedule.name} {'backward' if schedule.backward else 'forward'}",
            self.cp.trace,
        )
        return ScheduleExecutor(schedule, self.layout, transfers, self.kernels, self.cp.pool, scale)

    def _heads(self, q: Tensor, k: Tensor) -> Heads:
        return Heads(self.cp.rank % self.cp.ulysses, self.cp.ulysses, q.shape[1], k.shape[1])

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """Return out [B, Hq, n, D] and lse [B, Hq / h, L], which covers this rank's heads and its position's tokens."""
        schedule = self.schedules[0]
        executor = self._executor(schedule, q, k, scale)
        if not schedule.gather:
            return executor.forward(q, k, v)
        heads = self._heads(q, k)
        gathered, lse = executor.forward(*gather(schedule.gather[0], executor.transfers, heads, [q, k, v]))
        out = torch.zeros_like(q)
        scatter(schedule.scatter[0], executor.transfers, heads, [gathered], [out])
        return out, lse

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return dq, dk and dv in the inputs' types, computed from the global out and lse."""
        schedule = self.schedules[1]
        executor = self._executor(schedule, q, k, scale)
        dkv_dtype = self.cp.grad_dtype or accumulator_dtype(q.dtype)
        if not schedule.gather:
            dq, dk, dv = executor.backward(dout, q, k, v, out, lse, dkv_dtype)
            return like(dq, q), like(dk, k), like(dv, v)
        heads = self._heads(q, k)
        saved = gather(schedule.gather[0], executor.transfers, heads, [q, out, dout, k, v])
        qg, outg, doutg, kg, vg = saved
        dq_part, *dkv_part = executor.backward(doutg, qg, kg, vg, outg, lse, dkv_dtype)
        dq = torch.zeros_like(q)
        scatter(schedule.scatter[0], executor.transfers, heads, [dq_part.to(q.dtype)], [dq])
        dk, dv = (torch.zeros_like(x, dtype=accumulator_dtype(x.dtype)) for x in (k, v))
        scatter(schedule.scatter[1], executor.transfers, heads, [part.to(dkv_dtype) for part in dkv_part], [dk, dv])
        return dq, like(dk, k), like(dv, v)

    def local_lse(self, lse: Tensor, q_heads: int) -> Tensor:
        """Exchange lse [B, Hq / h, L] for [B, Hq, n]; only a caller that asks for lse pays for this exchange."""
        if self.cp.ulysses == 1:
            return lse
        h, me = self.cp.ulysses, self.cp.rank % self.cp.ulysses
        heads = Heads(me, h, q_heads, q_heads)
        out = lse.new_zeros((lse.shape[0], q_heads, lse.shape[2] // h, 1))
        transfers = TransferQueue(self.cp.transport, self.cp.bytes, "lse", self.cp.trace)
        scatter(self.schedules[0].scatter[0], transfers, heads, [lse[..., None]], [out])
        return out[..., 0]


class LayoutCache:
    """Recently used layouts of one (seq_len, kind), by document boundaries; the op finds the cache by its handle."""

    def __init__(self, cp: AttentionGroup, seq_len: int, kind: LayoutKind) -> None:
        self.cp, self.seq_len = cp, seq_len
        self.kind: LayoutKind = kind
        self.handle = op.enter(self)
        self.recent: OrderedDict[bytes, RankAttention] = OrderedDict()

    def prepare(self, boundaries: np.ndarray, arithmetic: SequenceLayout | None = None) -> RankAttention:
        """Return the attention for these boundaries, building it unless it is in the cache."""
        key = boundaries.tobytes()
        if key not in self.recent:
            if arithmetic is None:
                arithmetic = SequenceLayout(
                    self.seq_len,
                    self.cp.ring_positions,
                    kind=self.kind,
                    boundaries=boundaries,
                    ulysses=self.cp.ulysses,
                )
            self.recent[key] = RankAttention(self.cp, arithmetic)
            while len(self.recent) > LAYOUTS_KEPT:
                self.recent.popitem(last=False)
        self.recent.move_to_end(key)
        return self.recent[key]

    def lse_shape(self, q: Tensor) -> tuple[int, int, int]:
        h = self.cp.ulysses
        return q.shape[0], q.shape[1] // h, q.shape[2] * h

    def run_forward(self, q: Tensor, k: Tensor, v: Tensor, boundaries: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        with self.cp.lock:
            return self.prepare(boundaries.numpy()).forward(q, k, v, scale)

    def run_backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        boundaries: Tensor,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        with self.cp.lock:
            return self.prepare(boundaries.numpy()).backward(dout, q, k, v, out, lse, scale)
