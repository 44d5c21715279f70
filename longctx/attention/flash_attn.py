"""The kernels of the flash-attn packages: flash_attn (2), flash_attn_interface (3) and flash_attn.cute (4).

These optional packages are imported here and nowhere else. All three take tokens before heads: [B, S, H, D], or
[T, H, D] with cu_seqlens in a packed call. Their backward takes any out and lse, so also the global ones of a ring.
"""

from __future__ import annotations

import warnings
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

from longctx.attention.kernel import Backward, Forward, Kernel, Lengths, Problem, Varlen, cuda_requirements

Gradients = tuple[Tensor, Tensor, Tensor]


def _turned(*tensors: Tensor) -> tuple[Tensor, ...]:
    """[B, H, S, D] <-> [B, S, H, D]."""
    return tuple(x.transpose(1, 2) for x in tensors)


def _heads_first(forward: Forward, backward: Backward) -> tuple[Forward, Backward]:
    """A package's dense calls for [B, H, S, D]; it takes [B, S, H, D]."""

    def turned_forward(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        out, lse = forward(*_turned(q, k, v), causal=causal, scale=scale)
        return out.transpose(1, 2), lse

    def turned_backward(
        dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, causal: bool, scale: float
    ) -> Gradients:
        dq, dk, dv = backward(*_turned(dout, q, k, v, out), lse, causal=causal, scale=scale)
        return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)

    return turned_forward, turned_backward


def _results(*inputs: Tensor) -> list[Tensor]:
    return [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in inputs]


def _named(at: Lengths | None) -> dict[str, Any]:
    """The lengths of a packed call as flash-attn 3 and 4 name them; nothing for a dense one."""
    if at is None:
        return {}
    return {"cu_seqlens_q": at.cu_q, "cu_seqlens_k": at.cu_k, "max_seqlen_q": at.max_q, "max_seqlen_k": at.max_k}


# --- flash-attn 4 (PyPI flash-attn-4; Hopper and Blackwell)

# Its compiler says this of every kernel it makes, in half a screen.
warnings.filterwarnings("ignore", message="Argument aux_data", category=UserWarning)


def _fa4_reasons(problem: Problem) -> list[str]:
    reasons = cuda_requirements(problem, package="flash_attn.cute.interface", sm=90)
    if problem.capability[0] in (10, 11) and 128 < problem.head_dim != 256:
        reasons.append(f"needs a head dimension up to 128, or 256, on Blackwell, got {problem.head_dim}")
    return reasons


def _fa4_forward(
    q: Tensor, k: Tensor, v: Tensor, at: Lengths | None = None, *, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    from flash_attn.cute.interface import _flash_attn_fwd  # type: ignore[import-not-found]

    out, lse, *_ = _flash_attn_fwd(q, k, v, softmax_scale=scale, causal=causal, return_lse=True, **_named(at))
    return out, lse


def _fa4_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, at: Lengths | None = None,
    *, causal: bool, scale: float,
) -> Gradients:  # fmt: skip
    from flash_attn.cute.interface import _flash_attn_bwd  # type: ignore[import-not-found]

    found = _flash_attn_bwd(q, k, v, out, dout, lse.contiguous(), softmax_scale=scale, causal=causal, **_named(at))
    return found[0], found[1], found[2]


# --- flash-attn 3 (Hopper; built from source, package flash_attn_interface)


def _fa3_reasons(problem: Problem) -> list[str]:
    reasons = cuda_requirements(problem, package="flash_attn_interface", sm=90)
    if problem.device == "cuda" and problem.capability[0] > 9:
        reasons.append(f"is built for Hopper (9.0), got {'.'.join(map(str, problem.capability))}")
    return reasons


def _fa3_forward(
    q: Tensor, k: Tensor, v: Tensor, at: Lengths | None = None, *, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    from flash_attn_interface import _flash_attn_forward  # type: ignore[import-not-found]

    out, lse, *_ = _flash_attn_forward(q, k, v, softmax_scale=scale, causal=causal, **_named(at))
    return out, lse


def _fa3_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, at: Lengths | None = None,
    *, causal: bool, scale: float,
) -> Gradients:  # fmt: skip
    from flash_attn_interface import _flash_attn_backward  # type: ignore[import-not-found]

    dq, dk, dv = _results(q, k, v)
    lengths = (None,) * 6 if at is None else (at.cu_q, at.cu_k, None, None, at.max_q, at.max_k)
    # Positions, not names: the flag is `causal` in older builds and `is_causal` in newer ones.
    _flash_attn_backward(dout, q, k, v, out, lse.contiguous(), *lengths, dq, dk, dv, scale, causal)
    return dq, dk, dv


# --- flash-attn 2 (package flash_attn)


def _fa2_reasons(problem: Problem) -> list[str]:
    reasons = cuda_requirements(problem, package="flash_attn")
    try:
        if tuple(map(int, version("flash-attn").split(".")[:2])) < (2, 7):
            reasons.append(f"needs flash-attn 2.7 or later, got {version('flash-attn')}")
    except PackageNotFoundError:
        pass  # cuda_requirements has listed the missing package
    if problem.head_dim > 192 and problem.capability in ((8, 6), (8, 9), (12, 0)):
        reasons.append(f"its backward has no head dimension above 192 on this GPU, got {problem.head_dim}")
    return reasons


_FA2 = {"window_size_left": -1, "window_size_right": -1, "softcap": 0.0, "alibi_slopes": None}


def _fa2_forward(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    from flash_attn.flash_attn_interface import _flash_attn_forward  # type: ignore[import-not-found]

    out, lse, *_ = _flash_attn_forward(q, k, v, 0.0, scale, causal, **_FA2, return_softmax=False)
    return out, lse


def _fa2_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, causal: bool, scale: float
) -> Gradients:
    from flash_attn.flash_attn_interface import _flash_attn_backward  # type: ignore[import-not-found]

    dq, dk, dv = _results(q, k, v)
    given = (dout, q, k, v, out, lse.contiguous(), dq, dk, dv)
    _flash_attn_backward(*given, 0.0, scale, causal, **_FA2, deterministic=False)
    return dq, dk, dv


def _fa2_packed_forward(
    q: Tensor, k: Tensor, v: Tensor, at: Lengths, *, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    from flash_attn.flash_attn_interface import _flash_attn_varlen_forward  # type: ignore[import-not-found]

    lengths = (at.cu_q, at.cu_k, at.max_q, at.max_k)
    out, lse, *_ = _flash_attn_varlen_forward(q, k, v, *lengths, 0.0, scale, causal, **_FA2, return_softmax=False)
    return out, lse


def _fa2_packed_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, at: Lengths, *, causal: bool, scale: float
) -> Gradients:
    from flash_attn.flash_attn_interface import _flash_attn_varlen_backward  # type: ignore[import-not-found]

    dq, dk, dv = _results(q, k, v)
    given = (dout, q, k, v, out, lse.contiguous(), dq, dk, dv, at.cu_q, at.cu_k, at.max_q, at.max_k)
    _flash_attn_varlen_backward(*given, 0.0, scale, causal, **_FA2, deterministic=False)
    return dq, dk, dv


FLASH_ATTN_4 = Kernel(
    "flash_attn_4", *_heads_first(_fa4_forward, _fa4_backward), _fa4_reasons, varlen=Varlen(_fa4_forward, _fa4_backward)
)
FLASH_ATTN_3 = Kernel(
    "flash_attn_3", *_heads_first(_fa3_forward, _fa3_backward), _fa3_reasons, varlen=Varlen(_fa3_forward, _fa3_backward)
)
FLASH_ATTN_2 = Kernel(
    "flash_attn_2", *_heads_first(_fa2_forward, _fa2_backward), _fa2_reasons,
    varlen=Varlen(_fa2_packed_forward, _fa2_packed_backward),
)  # fmt: skip
