"""A kernel with flash-attn's varlen interface in plain fp64, which checks its arguments and poisons what it may not
write: the oracle of the bookkeeping around cu_seqlens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from longctx.attention import kernels, reference
from longctx.attention.kernel import CallShape, Kernel, Lengths, Varlen


def _segments(q: Tensor, k: Tensor, at: Lengths, causal: bool) -> Iterator[tuple[slice, slice]]:
    """The segments, after every rule of flash-attn's varlen functions has been checked."""
    assert q.dim() == k.dim() == 3
    assert q.stride(-1) == k.stride(-1) == 1
    assert q.shape[1] % k.shape[1] == 0
    edges = []
    for cu, x, bound in ((at.cu_q, q, at.max_q), (at.cu_k, k, at.max_k)):
        assert cu.dtype == torch.int32
        assert cu.is_contiguous()
        assert cu.device == x.device
        edges.append(cu.tolist())
        sizes = [b - a for a, b in zip(edges[-1], edges[-1][1:], strict=False)]
        assert edges[-1][0] == 0
        assert edges[-1][-1] == len(x), (edges[-1][-1], len(x))
        assert min(sizes) > 0
        assert max(sizes) <= bound
        assert bound > 1  # flash-attn has another kernel, with another shape of lse, for one query per segment
    assert len(edges[0]) == len(edges[1])
    for a, b, c, d in zip(edges[0], edges[0][1:], edges[1], edges[1][1:], strict=False):
        assert not causal or b - a == d - c, "top-left and bottom-right masks differ"
        yield slice(a, b), slice(c, d)


def _dense(x: Tensor) -> Tensor:
    return x.transpose(0, 1)[None]


@dataclass
class PackedKernel:
    """Counts its calls: (segments, causal) of each packed one."""

    calls: list[tuple[int, bool]] = field(default_factory=list)
    dense: int = 0

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, at: Lengths, *, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor]:
        out, lse = torch.full_like(q, float("nan")), q.new_full((q.shape[1], len(q)), float("nan"))
        count = 0
        for rows, keys in _segments(q, k, at, causal):
            part, total = reference.forward(
                _dense(q[rows]), _dense(k[keys]), _dense(v[keys]), causal=causal, scale=scale
            )
            out[rows], lse[:, rows] = part[0].transpose(0, 1), total[0]
            count += 1
        self.calls.append((count, causal))
        return out, lse

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, at: Lengths, *, causal: bool,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        assert lse.shape == (q.shape[1], len(q))
        assert lse.is_contiguous()
        assert dout.shape == out.shape == q.shape
        found = tuple(torch.full(x.shape, float("nan"), dtype=x.dtype) for x in (q, k, v))
        count = 0
        for rows, keys in _segments(q, k, at, causal):
            given = [_dense(x) for x in (dout[rows], q[rows], k[keys], v[keys], out[rows])]
            parts = reference.backward(*given, lse[:, rows][None], causal=causal, scale=scale)
            for total, part, where in zip(found, parts, (rows, keys, keys), strict=True):
                total[where] = part[0].transpose(0, 1)
            count += 1
        self.calls.append((count, causal))
        return found

    def alone(self, *tensors: Tensor, **options) -> tuple[Tensor, Tensor]:
        self.dense += 1
        return reference.forward(*tensors, **options)

    def kernel(self, name: str = "packed") -> Kernel:
        varlen = Varlen(self.forward, self.backward)
        return Kernel(name, self.alone, reference.backward, lambda problem: [], varlen=varlen)


def picky(block: int) -> Kernel:
    """A kernel without packed calls that leaves small rectangles to others, as cuDNN does."""

    def refuses(shape: CallShape) -> str | None:
        return f"takes blocks of {block} and more" if min(shape.queries, shape.keys) < block else None

    return Kernel("picky", reference.forward, reference.backward, lambda problem: [], refuses)


def install(monkeypatch, *made: Kernel) -> None:
    """Make these kernels and `reference` the only ones."""
    known = {kernel.name: kernel for kernel in (*made, kernels.KERNELS["reference"])}
    monkeypatch.setattr(kernels, "KERNELS", known)
    kernels.choose.cache_clear()
    kernels.serving.cache_clear()
