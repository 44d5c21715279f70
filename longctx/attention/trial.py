"""Tries a GPU's attention kernel on a small problem, beside the reference, before a run relies on it.

A package that can be imported may still fail at its first call, or compute something else: it was built for another
CUDA or torch, its compiler is missing, another release has other arguments. The trial makes a ring's calls, forward and
backward: a causal block, a block without a mask, and several documents at once if the kernel can do that.

Shapes: T tokens, H query heads of one kv head, D head dimension.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from itertools import accumulate, pairwise
from threading import RLock

import torch
from torch import Tensor

from longctx.attention import reference
from longctx.attention.kernel import Kernel, Lengths, Problem
from longctx.errors import named

DOCUMENTS = (1, 64, 447)  # tokens of each
TOKENS = sum(DOCUMENTS)
BAR = 3e-2  # relative L2 distance; bfloat16's rounding makes 2e-3 to 6e-3
NAMES = ("out", "lse", "dq", "dk", "dv")

_one_at_a_time = RLock()  # virtual ranks are threads


def failure(kernel: Kernel, problem: Problem) -> str:
    """Why the kernel's results cannot be relied on here, or an empty text; a kernel is tried once in a process.

    Only the kernels of a GPU that this process can use are tried: a plan is made on other machines, too.
    """
    if problem.device != "cuda" or kernel.forward is reference.forward or not torch.cuda.is_available():
        return ""
    with _one_at_a_time:
        return _failure(kernel, problem)


@lru_cache(maxsize=64)
def _failure(kernel: Kernel, problem: Problem) -> str:
    return tried(kernel, problem)


def tried(kernel: Kernel, problem: Problem) -> str:
    """Make the calls and compare them; returns what went wrong, or an empty text."""
    try:
        with torch.no_grad(), torch.autocast(problem.device, enabled=False):
            for call, found, wanted in _calls(kernel, problem):
                for name, a, b in zip(NAMES, found, wanted, strict=True):
                    if a.shape != b.shape:
                        return f"its {call} gives {name} of shape {tuple(a.shape)}, not {tuple(b.shape)}"
                    distance = float((a.float() - b.float()).norm() / b.float().norm())
                    if not distance <= BAR:
                        return (
                            f"its {call} gives {name} at a distance of {distance:.1e} from the reference (bar {BAR:g})"
                        )
    except torch.OutOfMemoryError:  # says nothing of the kernel
        return ""
    except Exception as error:  # whatever a compiler or another release of a package raises
        return f"it fails here ({named(error)[:240]})"
    return ""


def _calls(kernel: Kernel, problem: Problem) -> Iterator[tuple[str, list[Tensor], list[Tensor]]]:
    """Each call by name, what it gives and what the reference gives."""
    scale = problem.head_dim**-0.5
    q, k, v, dout = _drawn(problem)
    for call, causal in (("causal call", True), ("call without a mask", False)):
        out, lse = kernel.forward(q, k, v, causal=causal, scale=scale)
        found = [out, lse, *kernel.backward(dout, q, k, v, out, lse, causal=causal, scale=scale)]
        yield call, found, _expected(q, k, v, dout, causal, scale)
    if kernel.varlen is None:
        return
    cu = torch.tensor([0, *accumulate(DOCUMENTS)], dtype=torch.int32, device=problem.device)
    at = Lengths(cu, cu, TOKENS, TOKENS)
    packed = [x[0].transpose(0, 1).contiguous() for x in (q, k, v, dout)]
    out, lse = kernel.varlen.forward(*packed[:3], at, causal=True, scale=scale)
    gradients = kernel.varlen.backward(packed[3], *packed[:3], out, lse, at, causal=True, scale=scale)
    parts = []
    for first, past in pairwise([0, *accumulate(DOCUMENTS)]):
        one = [x[:, :, first:past] for x in (q, k, v, dout)]
        parts.append(_expected(one[0], one[1], one[2], one[3], True, scale))
    wanted = [torch.cat([part[i] for part in parts], 2)[0] for i in range(5)]  # [H, T, D], lse [H, T]
    found = [out.transpose(0, 1), lse, *(x.transpose(0, 1) for x in gradients)]
    yield "packed call", found, wanted


def _drawn(problem: Problem) -> list[Tensor]:
    """q, k, v and a gradient of out, [1, heads, T, D], tokens before heads in memory, as projections leave them."""
    make = torch.Generator().manual_seed(problem.head_dim)
    group = max(1, problem.q_heads // problem.kv_heads)
    shapes = [(1, TOKENS, heads, problem.head_dim) for heads in (group, 1, 1, group)]
    return [torch.randn(s, generator=make).to(problem.device, problem.dtype).transpose(1, 2) for s in shapes]


def _expected(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, causal: bool, scale: float) -> list[Tensor]:
    q, k, v, dout = (x.float() for x in (q, k, v, dout))
    out, lse = reference.forward(q, k, v, causal=causal, scale=scale)
    return [out, lse, *reference.backward(dout, q, k, v, out, lse, causal=causal, scale=scale)]
