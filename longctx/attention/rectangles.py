"""Serves the rectangles of one hop with as few kernel calls as their kernels allow.

A kernel with cu_seqlens takes all causal rectangles of a hop in one call, and all plain ones in another: the documents
on the diagonal, and what two ranks share of several documents. A kernel without takes them one by one, and leaves
those that it cannot serve to the next. Which call serves a rectangle depends on lengths alone, so it is the same in
every step, on a resumed run, and in forward and backward.

Shapes: L tokens of a ring position, T tokens of a packed tensor per sequence of the batch. Dense tensors are
[B, H, L, D] and lse [B, H, L]; packed tensors are [B T, H, D] and lse [H, B T].
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from threading import Lock

import numpy as np
import torch
from torch import Tensor

from longctx.attention.kernel import CallShape, Kernel, Lengths, Problem
from longctx.attention.kernels import serving
from longctx.layout import Rect

log = logging.getLogger("longctx.attention")

Part = tuple[slice, Tensor, Tensor]  # rows of queries with their out and lse, or tokens of keys with their dK and dV
Key = tuple[tuple[int, ...], tuple[int, int]]  # the blocks and the part that a hop computes on


@dataclass(frozen=True, eq=False)
class DenseCall:
    """One rectangle in one call; the tensors are slices, nothing is copied."""

    kernel: Kernel
    rect: Rect

    def covers(self, length: int) -> bool:
        return self.rect == (0, length, 0, length, True)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> list[Part]:
        rows, keys = self._slices()
        given = _tokens(q, rows), _tokens(k, keys), _tokens(v, keys)
        out, lse = self.kernel.forward(*given, causal=self.rect.causal, scale=scale)
        return [(rows, out, lse)]

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
    ) -> tuple[list[tuple[slice, Tensor]], list[Part]]:
        rows, keys = self._slices()
        given = [_tokens(x, where) for x, where in ((dout, rows), (q, rows), (k, keys), (v, keys), (out, rows))]
        dq, dk, dv = self.kernel.backward(*given, _tokens(lse, rows), causal=self.rect.causal, scale=scale)
        return [(rows, dq)], [(keys, dk, dv)]

    def _slices(self) -> tuple[slice, slice]:
        return slice(self.rect.q0, self.rect.q1), slice(self.rect.k0, self.rect.k1)


def _tokens(x: Tensor, where: slice) -> Tensor:
    """The tokens `where` of x [B, H, L, ...], x itself where they are all."""
    return x if where.stop - where.start == x.shape[2] else x.narrow(2, where.start, where.stop - where.start)


@dataclass(frozen=True)
class Runs:
    """The runs [first, past) of tokens that a packed tensor concatenates, in order; a token may be in several."""

    edges: tuple[tuple[int, int], ...]

    @classmethod
    def joining(cls, spans: Iterable[tuple[int, int]]) -> Runs:
        """The spans in their order, with neighbours joined where one begins at the other's end."""
        joined: list[tuple[int, int]] = []
        for first, past in spans:
            if joined and joined[-1][1] == first:
                first = joined.pop()[0]
            joined.append((first, past))
        return cls(tuple(joined))

    @property
    def count(self) -> int:
        """T, the tokens of the packed tensor per sequence."""
        return sum(past - first for first, past in self.edges)

    def pack(self, x: Tensor) -> Tensor:
        """[B, H, L, D] -> [B T, H, D]; without a copy for one run of one sequence."""
        return self._cut(x.transpose(1, 2), 1).flatten(0, 1)

    def pack_lse(self, lse: Tensor) -> Tensor:
        """[B, H, L] -> [H, B T]."""
        return self._cut(lse, 2).transpose(0, 1).flatten(1, 2)

    def _cut(self, x: Tensor, dim: int) -> Tensor:
        parts = [x.narrow(dim, first, past - first) for first, past in self.edges]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim)

    def unpack(self, packed: Tensor, batch: int) -> list[tuple[slice, Tensor]]:
        """[B T, H, D] -> the runs, each as its tokens and [B, H, run, D]."""
        whole = packed.unflatten(0, (batch, self.count)).transpose(1, 2)
        return self._pieces(whole)

    def unpack_lse(self, packed: Tensor, batch: int) -> list[tuple[slice, Tensor]]:
        """[H, B T] -> the runs, each as its tokens and [B, H, run]."""
        return self._pieces(packed.unflatten(1, (batch, self.count)).transpose(0, 1))

    def _pieces(self, whole: Tensor) -> list[tuple[slice, Tensor]]:
        found, at = [], 0
        for first, past in self.edges:
            found.append((slice(first, past), whole.narrow(2, at, past - first)))
            at += past - first
        return found


class PackedCall:
    """Many rectangles, all causal or none, in one call with cu_seqlens."""

    def __init__(self, kernel: Kernel, rects: Sequence[Rect]) -> None:
        assert kernel.varlen is not None
        self.kernel, self.varlen, self.causal = kernel, kernel.varlen, rects[0].causal
        self.queries = Runs.joining((rect.q0, rect.q1) for rect in rects)
        self.keys = Runs.joining((rect.k0, rect.k1) for rect in rects)
        self._sizes = tuple(np.array(n) for n in ([r.q1 - r.q0 for r in rects], [r.k1 - r.k0 for r in rects]))
        self._lengths: dict[tuple[torch.device, int], Lengths] = {}

    def covers(self, length: int) -> bool:
        return self.queries.edges == self.keys.edges == ((0, length),)

    def lengths(self, device: torch.device, batch: int) -> Lengths:
        """cu_seqlens of all sequences of the batch, on the device; they are copied there once."""
        if (device, batch) not in self._lengths:
            edges = []
            for sizes in self._sizes:
                cu = torch.from_numpy(np.r_[0, np.cumsum(np.tile(sizes, batch))].astype(np.int32))
                # From pinned memory, so that the host does not wait for the device.
                edges.append(cu.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else cu)
            # Bounds are rounded up: flash-attn gives calls of one query per segment another shape of lse, and its
            # fourth version compiles another kernel for segments of one block.
            bounds = [-(-int(sizes.max()) // 128) * 128 for sizes in self._sizes]
            self._lengths[device, batch] = Lengths(edges[0], edges[1], bounds[0], bounds[1])
        return self._lengths[device, batch]

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> list[Part]:
        batch = q.shape[0]
        inputs = self.queries.pack(q), self.keys.pack(k), self.keys.pack(v)
        out, lse = self.varlen.forward(*inputs, self.lengths(q.device, batch), causal=self.causal, scale=scale)
        outs, sums = self.queries.unpack(out, batch), self.queries.unpack_lse(lse, batch)
        return [(rows, part, total) for (rows, part), (_, total) in zip(outs, sums, strict=True)]

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
    ) -> tuple[list[tuple[slice, Tensor]], list[Part]]:
        batch = q.shape[0]
        dq, dk, dv = self.varlen.backward(
            self.queries.pack(dout), self.queries.pack(q), self.keys.pack(k), self.keys.pack(v),
            self.queries.pack(out), self.queries.pack_lse(lse).contiguous(), self.lengths(q.device, batch),
            causal=self.causal, scale=scale,
        )  # fmt: skip
        keys, values = self.keys.unpack(dk, batch), self.keys.unpack(dv, batch)
        parts = [(where, part, other) for (where, part), (_, other) in zip(keys, values, strict=True)]
        return self.queries.unpack(dq, batch), parts


Call = DenseCall | PackedCall


def plan_calls(rects: Sequence[Rect], kernels: Sequence[Kernel], recurring: bool) -> list[Call]:
    """The calls that serve `rects`, by the first kernel and for what it leaves by the next ones.

    recurring: every step has rectangles of these shapes, because the sequence is one document.
    """
    kernel, *others = kernels
    if kernel.varlen is not None:
        groups = [[rect for rect in rects if rect.causal is causal] for causal in (True, False)]
        return [
            PackedCall(kernel, group) if len(group) > 1 else DenseCall(kernel, group[0]) for group in groups if group
        ]
    calls: list[Call] = []
    left: list[Rect] = []
    for rect in rects:
        reason = kernel.refuses(CallShape(rect.q1 - rect.q0, rect.k1 - rect.k0, recurring))
        if reason is None:
            calls.append(DenseCall(kernel, rect))
        else:
            left.append(rect)
            with _saying:  # virtual ranks are threads, which may come here at one time
                _say_left(kernel.name, reason, others[0].name)
    return calls + (plan_calls(left, others, recurring) if left else [])


_saying = Lock()


@lru_cache(maxsize=64)
def _say_left(kernel: str, reason: str, other: str) -> None:
    """Say once that a kernel leaves some rectangles to another."""
    log.info("attention kernel %s %s; %s serves the others", kernel, reason, other)


@dataclass
class RectangleKernels:
    """Calls kernels for the rectangles of one rank under one layout, and remembers which calls serve a hop.

    name: the kernel that is asked for (None: the first that can). recurring: as in `plan_calls`.
    """

    name: str | None
    recurring: bool
    _plans: dict[tuple[Problem, Key], list[Call]] = field(default_factory=dict)

    def calls(self, problem: Problem, key: Key, rects: Sequence[Rect]) -> list[Call]:
        """The calls that serve a hop's rectangles; key names the hop's blocks and part."""
        if (problem, key) not in self._plans:
            kernels = serving(problem, self.name)
            self._plans[problem, key] = plan_calls(rects, kernels, self.recurring) if rects else []
        return self._plans[problem, key]
