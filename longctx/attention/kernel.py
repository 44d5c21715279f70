"""A kernel, what it must serve, and the lengths of a packed call: the types that every backend shares.

Shapes: q, out, dout [B, Hq, Sq, D]; k, v [B, Hkv, Sk, D]; lse [B, Hq, Sq], the natural logarithm of the softmax's
denominator. A packed call has no batch and its tokens come before its heads, as flash-attn's varlen functions take
them: q [Tq, Hq, D], k and v [Tk, Hkv, D], lse [Hq, Tq].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec

import torch
from torch import Tensor

from longctx.errors import first_line

Forward = Callable[..., tuple[Tensor, Tensor]]
Backward = Callable[..., tuple[Tensor, Tensor, Tensor]]


@dataclass(frozen=True)
class Problem:
    """The problem that a kernel must serve; `capability` is the CUDA compute capability, (0, 0) on a CPU."""

    device: str
    dtype: torch.dtype
    head_dim: int
    q_heads: int
    kv_heads: int
    capability: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class CallShape:
    """The rectangle of one dense call: its queries and keys, and whether every step has calls of the same shape."""

    queries: int
    keys: int
    recurring: bool


@dataclass(frozen=True)
class Lengths:
    """The segments of a packed call: queries [cu_q[i], cu_q[i + 1]) attend to keys [cu_k[i], cu_k[i + 1]).

    cu_q and cu_k are int32 on the tensors' device. max_q and max_k are upper bounds of the segments' lengths.
    """

    cu_q: Tensor
    cu_k: Tensor
    max_q: int
    max_k: int


@dataclass(frozen=True)
class Varlen:
    """Many segments in one call: forward(q, k, v, lengths), backward(dout, q, k, v, out, lse, lengths)."""

    forward: Forward
    backward: Backward


def _serves_every_shape(shape: CallShape) -> str | None:
    return None


@dataclass(frozen=True)
class Kernel:
    """A kernel, and what it cannot serve.

    forward and backward take causal= and scale=; causal=True needs Sq == Sk, because ATen aligns the mask top-left and
    flash-attn bottom-right. The last dimension must be contiguous, the other strides are free. unsupported_reasons
    lists why the kernel cannot serve a problem at all, refuses why it leaves one rectangle of a problem to another
    kernel (None: it serves it). varlen: the same for many segments at once, if the kernel can.
    """

    name: str
    forward: Forward
    backward: Backward
    unsupported_reasons: Callable[[Problem], list[str]]
    refuses: Callable[[CallShape], str | None] = _serves_every_shape
    varlen: Varlen | None = None


def cuda_requirements(problem: Problem, *, package: str | None = None, sm: int = 80, head_dims: int = 256) -> list[str]:
    """The requirements of every fast CUDA kernel that `problem` does not meet.

    package: a module that must import. sm: the least compute capability, 80 for 8.0. head_dims: the largest one.
    """
    reasons = []
    if problem.device != "cuda":
        reasons.append(f"needs CUDA tensors, got {problem.device}")
    elif problem.capability[0] * 10 + problem.capability[1] < sm:
        reasons.append(f"needs compute capability {sm / 10}, got {'.'.join(map(str, problem.capability))}")
    if problem.dtype not in (torch.float16, torch.bfloat16):
        reasons.append(f"needs fp16 or bf16, got {problem.dtype}")
    if problem.head_dim % 8 or problem.head_dim > head_dims:
        reasons.append(f"needs a head dimension that is a multiple of 8 up to {head_dims}, got {problem.head_dim}")
    if package and (missing := missing_package(package, run=not reasons)):
        reasons.append(missing)
    return reasons


def missing_package(module: str, *, run: bool) -> str | None:
    """The reason why a module cannot be used, or None.

    A folder without an __init__.py is a namespace, which another distribution may have made (flash-attn-4 makes
    `flash_attn`), so it does not count as an installed package. run: also import it, so that a build for another torch
    or CUDA is a reason and no traceback.
    """
    top, *inner = module.split(".")
    spec = find_spec(top)
    where = list(spec.submodule_search_locations or []) if spec else []
    if spec is None or (not inner and spec.origin is None):
        return f"the package {module} is not installed"
    if inner and not any(_is_module(folder, inner) for folder in where):
        return f"the package {module} is not installed"
    return _import_error(module) if run else None


def _is_module(folder: str, inner: list[str]) -> bool:
    from pathlib import Path

    place = Path(folder, *inner)
    return place.with_suffix(".py").is_file() or (place / "__init__.py").is_file()


@lru_cache(maxsize=16)
def _import_error(module: str) -> str | None:
    try:
        import_module(module)
    except Exception as error:  # a build for another torch may raise anything: OSError, RuntimeError, SystemError
        first = first_line(error)
        return f"the package {module} is installed and cannot be imported ({first})"
    return None
