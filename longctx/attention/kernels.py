"""Every attention kernel that longctx can call, with the reasons why it cannot serve a problem.

A kernel has a forward that returns (out, lse) and a backward that takes the *global* out and lse, as a ring needs.
Nothing falls back silently: `choose` logs its choice once, `explain` gives the reasons against every other kernel, and
a kernel that is asked for by name and cannot serve is an error with its reasons. Optional packages are imported only
here.

Shapes::

    q, out, dout  [B, Hq, Sq, D]
    k, v          [B, Hkv, Sk, D]
    lse           [B, Hq, Sq]

The last dimension must be contiguous; the other strides are free. causal=True needs Sq == Sk: ATen aligns the mask
top-left and flash-attn >= 2.1 bottom-right, and they agree only there.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

import torch
from torch import Tensor

from longctx.attention import reference

log = logging.getLogger("longctx.attention")

Forward = Callable[..., tuple[Tensor, Tensor]]
Backward = Callable[..., tuple[Tensor, Tensor, Tensor]]
aten = torch.ops.aten


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
class Kernel:
    """A kernel: forward, backward, and a function that lists the reasons why it cannot serve a problem."""

    name: str
    forward: Forward
    backward: Backward
    unsupported_reasons: Callable[[Problem], list[str]]


def problem_of(q: Tensor, k: Tensor) -> Problem:
    capability = torch.cuda.get_device_capability(q.device) if q.is_cuda else (0, 0)
    return Problem(q.device.type, q.dtype, q.shape[3], q.shape[1], k.shape[1], capability)


def _needs(problem: Problem, *, package: str | None = None, sm: int = 80, heads: int = 256) -> list[str]:
    """The requirements of every CUDA kernel that `problem` does not meet."""
    reasons = []
    if problem.device != "cuda":
        reasons.append(f"needs CUDA tensors, got {problem.device}")
    elif problem.capability[0] * 10 + problem.capability[1] < sm:
        reasons.append(f"needs compute capability {sm / 10}, got {'.'.join(map(str, problem.capability))}")
    if problem.dtype not in (torch.float16, torch.bfloat16):
        reasons.append(f"needs fp16 or bf16, got {problem.dtype}")
    if problem.head_dim % 8 or problem.head_dim > heads:
        reasons.append(f"needs a head dimension that is a multiple of 8 up to {heads}, got {problem.head_dim}")
    if package and find_spec(package) is None:
        reasons.append(f"the package {package} is not installed")
    return reasons


# --- flash-attn 3 (Hopper; package flash_attn_interface)


def _fa3_reasons(problem: Problem) -> list[str]:
    reasons = _needs(problem, package="flash_attn_interface", sm=90)
    if problem.device == "cuda" and problem.capability[0] > 9:
        reasons.append(f"is built for Hopper (9.0), got {'.'.join(map(str, problem.capability))}")
    return reasons


def _fa3_forward(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    from flash_attn_interface import _flash_attn_forward  # type: ignore[import-not-found]

    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out, lse, *_ = _flash_attn_forward(q, k, v, softmax_scale=scale, causal=causal)
    return out.transpose(1, 2), lse


def _fa3_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    from flash_attn_interface import _flash_attn_backward  # type: ignore[import-not-found]

    dout, q, k, v, out = (x.transpose(1, 2) for x in (dout, q, k, v, out))
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    lengths = (None,) * 6
    _flash_attn_backward(dout, q, k, v, out, lse.contiguous(), *lengths, dq, dk, dv, scale, causal)
    return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)


# --- flash-attn 2 (package flash_attn)


def _fa2_reasons(problem: Problem) -> list[str]:
    reasons = _needs(problem, package="flash_attn")
    try:
        if tuple(map(int, version("flash-attn").split(".")[:2])) < (2, 7):
            reasons.append(f"needs flash-attn 2.7 or later, got {version('flash-attn')}")
    except PackageNotFoundError:
        pass  # _needs has listed the missing package
    return reasons


def _fa2_forward(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    from flash_attn.flash_attn_interface import _flash_attn_forward  # type: ignore[import-not-found]

    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out, lse, *_ = _flash_attn_forward(q, k, v, 0.0, scale, causal, -1, -1, 0.0, None, False)
    return out.transpose(1, 2), lse


def _fa2_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    from flash_attn.flash_attn_interface import _flash_attn_backward  # type: ignore[import-not-found]

    dout, q, k, v, out = (x.transpose(1, 2) for x in (dout, q, k, v, out))
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    window, softcap, alibi, deterministic = (-1, -1), 0.0, None, False
    _flash_attn_backward(
        dout,
        q,
        k,
        v,
        out,
        lse.contiguous(),
        dq,
        dk,
        dv,
        0.0,
        scale,
        causal,
        *window,
        softcap,
        alibi,
        deterministic,
    )
    return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)


# --- torch's own CUDA kernels


def _aten_forward(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    out, lse, *_ = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=scale)
    return out, lse


def _no_dropout(q: Tensor) -> tuple[Tensor, Tensor]:
    """The random state that a backward takes as an argument and does not read without dropout."""
    return torch.zeros(2, dtype=torch.int64, device=q.device), torch.zeros((), dtype=torch.int64, device=q.device)


def _aten_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    seed, offset = _no_dropout(q)
    return aten._scaled_dot_product_flash_attention_backward(
        dout,
        q,
        k,
        v,
        out,
        lse.contiguous(),
        None,
        None,
        q.shape[2],
        k.shape[2],
        0.0,
        causal,
        seed,
        offset,
        scale=scale,
    )


def _cudnn_forward(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    out, lse, *_ = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, causal, False, scale=scale)
    return out, lse.reshape(q.shape[:3])


def _cudnn_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    seed, offset = _no_dropout(q)
    stats = lse.contiguous().unsqueeze(-1)  # cuDNN keeps its statistics as [B, H, S, 1]
    return aten._scaled_dot_product_cudnn_attention_backward(
        dout,
        q,
        k,
        v,
        out,
        stats,
        seed,
        offset,
        None,
        None,
        None,
        q.shape[2],
        k.shape[2],
        0.0,
        causal,
        scale=scale,
    )


def _cudnn_reasons(problem: Problem) -> list[str]:
    reasons = _needs(problem, heads=128)
    if problem.device == "cuda" and not torch.backends.cudnn.is_available():
        reasons.append("this torch has no cuDNN")
    return reasons


# --- torch's CPU flash and the reference


def _cpu_forward(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)


def _cpu_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return aten._scaled_dot_product_flash_attention_for_cpu_backward(dout, q, k, v, out, lse, 0.0, causal, scale=scale)


def _cpu_reasons(problem: Problem) -> list[str]:
    return [f"needs CPU tensors, got {problem.device}"] if problem.device != "cpu" else []


KERNELS: dict[str, Kernel] = {
    kernel.name: kernel
    for kernel in (
        Kernel("flash_attn_3", _fa3_forward, _fa3_backward, _fa3_reasons),
        Kernel("flash_attn_2", _fa2_forward, _fa2_backward, _fa2_reasons),
        Kernel("cudnn", _cudnn_forward, _cudnn_backward, _cudnn_reasons),
        Kernel("torch_flash", _aten_forward, _aten_backward, _needs),
        Kernel("torch_cpu", _cpu_forward, _cpu_backward, _cpu_reasons),
        Kernel("reference", reference.forward, reference.backward, lambda problem: []),
    )
}


def this_machine(head_dim: int = 128, q_heads: int = 32, kv_heads: int = 8) -> Problem:
    """The problem of a bf16 model on this machine's first GPU, or of an fp32 model on its CPU."""
    if torch.cuda.is_available():
        capability = torch.cuda.get_device_capability()
        return Problem("cuda", torch.bfloat16, head_dim, q_heads, kv_heads, capability)
    return Problem("cpu", torch.float32, head_dim, q_heads, kv_heads)


def explain(problem: Problem) -> dict[str, list[str]]:
    """All kernels in order of preference, each with the reasons why it cannot serve; an empty list: it can."""
    return {name: kernel.unsupported_reasons(problem) for name, kernel in KERNELS.items()}


@lru_cache(maxsize=64)
def choose(problem: Problem, name: str | None = None) -> Kernel:
    """The named kernel, or without a name the first that can serve.

    Raises ValueError for an unknown name, and with its reasons for a named kernel that cannot serve.
    """
    if name is not None:
        if name not in KERNELS:
            raise ValueError(f"kernel={name!r} is not one of {', '.join(KERNELS)}")
        if reasons := KERNELS[name].unsupported_reasons(problem):
            raise ValueError(f"kernel={name!r} cannot serve: {'; '.join(reasons)}")
        return KERNELS[name]
    chosen = next(kernel for kernel in KERNELS.values() if not kernel.unsupported_reasons(problem))
    slow = chosen.name == "reference" and problem.device == "cuda"
    note = ": it forms every score in memory, tens of times slower than a fast kernel" if slow else ""
    log.log(
        logging.WARNING if slow else logging.INFO,
        "attention kernel: %s for %s %s%s", chosen.name, problem.device, problem.dtype, note,
    )  # fmt: skip
    return chosen
