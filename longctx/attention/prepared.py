"""A layout with its two plans, ready to run on this rank: heads gathered if need be, the ring, and back."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from longctx.attention import op
from longctx.attention.courier import Courier
from longctx.attention.executor import Ring
from longctx.attention.kernels import choose, problem_of
from longctx.attention.merge import accumulator_dtype, like
from longctx.attention.ulysses import Heads, gather, scatter
from longctx.layout import Kind, SequenceLayout
from longctx.schedule import Plan, build

if TYPE_CHECKING:
    from longctx.attention.parallel import ContextParallel

PLANS_KEPT = 16  # boundaries whose plans are remembered, per (seq_len, kind)


class Prepared:
    """The plans of one SequenceLayout on one rank."""

    def __init__(self, cp: ContextParallel, layout: SequenceLayout) -> None:
        self.cp, self.layout = cp, layout
        self.plans = tuple(
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

    def _ring(self, plan: Plan, q: Tensor, k: Tensor, scale: float) -> Ring:
        kernel = choose(problem_of(q, k), self.cp.kernel)
        courier = Courier(
            self.cp.wire,
            self.cp.bytes,
            f"{plan.schedule} {'backward' if plan.backward else 'forward'}",
            self.cp.trace,
        )
        return Ring(plan, self.layout, courier, kernel, self.cp.pool, scale)

    def _heads(self, q: Tensor, k: Tensor) -> Heads:
        return Heads(self.cp.rank % self.cp.ulysses, self.cp.ulysses, q.shape[1], k.shape[1])

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """out [B, Hq, n, D] and lse, the latter over this rank's heads and the position's tokens."""
        plan = self.plans[0]
        ring = self._ring(plan, q, k, scale)
        if not plan.gather:
            return ring.forward(q, k, v)
        heads = self._heads(q, k)
        gathered, lse = ring.forward(*gather(plan.gather[0], ring.courier, heads, [q, k, v]))
        out = torch.zeros_like(q)
        scatter(plan.scatter[0], ring.courier, heads, [gathered], [out])
        return out, lse

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """dq, dk, dv of the inputs' types, from the global out and lse."""
        plan = self.plans[1]
        ring = self._ring(plan, q, k, scale)
        wire = self.cp.grad_dtype or accumulator_dtype(q.dtype)
        if not plan.gather:
            dq, dk, dv = ring.backward(dout, q, k, v, out, lse, wire)
            return like(dq, q), like(dk, k), like(dv, v)
        heads = self._heads(q, k)
        saved = gather(plan.gather[0], ring.courier, heads, [q, out, dout, k, v])
        qg, outg, doutg, kg, vg = saved
        dq_part, *dkv_part = ring.backward(doutg, qg, kg, vg, outg, lse, wire)
        dq = torch.zeros_like(q)
        scatter(plan.scatter[0], ring.courier, heads, [dq_part.to(q.dtype)], [dq])
        dk, dv = (torch.zeros_like(x, dtype=accumulator_dtype(x.dtype)) for x in (k, v))
        scatter(plan.scatter[1], ring.courier, heads, [part.to(wire) for part in dkv_part], [dk, dv])
        return dq, like(dk, k), like(dv, v)

    def local_lse(self, lse: Tensor, q_heads: int) -> Tensor:
        """[B, Hq / h, L] -> [B, Hq, n]: the one exchange lse ever needs, made only when it is asked for."""
        if self.cp.ulysses == 1:
            return lse
        h, me = self.cp.ulysses, self.cp.rank % self.cp.ulysses
        heads = Heads(me, h, q_heads, q_heads)
        out = lse.new_zeros((lse.shape[0], q_heads, lse.shape[2] // h, 1))
        courier = Courier(self.cp.wire, self.cp.bytes, "lse", self.cp.trace)
        scatter(self.plans[0].scatter[0], courier, heads, [lse[..., None]], [out])
        return out[..., 0]


class Family:
    """All layouts of one (seq_len, kind): what a handle stands for; new boundaries need no new handle."""

    def __init__(self, cp: ContextParallel, seq_len: int, kind: Kind) -> None:
        self.cp, self.seq_len = cp, seq_len
        self.kind: Kind = kind
        self.handle = op.enter(self)
        self.recent: OrderedDict[bytes, Prepared] = OrderedDict()

    def prepare(self, boundaries: np.ndarray, arithmetic: SequenceLayout | None = None) -> Prepared:
        """The layout and both plans of these boundaries, from memory if they were used lately."""
        key = boundaries.tobytes()
        if key not in self.recent:
            if arithmetic is None:
                arithmetic = SequenceLayout(
                    self.seq_len,
                    self.cp.positions,
                    kind=self.kind,
                    boundaries=boundaries,
                    ulysses=self.cp.ulysses,
                )
            self.recent[key] = Prepared(self.cp, arithmetic)
            while len(self.recent) > PLANS_KEPT:
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
