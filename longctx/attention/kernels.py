"""Every attention kernel that longctx can call in order of preference, and the choice among them.

A kernel has a forward that returns (out, lse) and a backward that takes the *global* out and lse, as a ring needs.
Nothing falls back silently: `choose` logs its choice once, `explain` gives the reasons against every other kernel, and
a kernel that is asked for by name and cannot serve is an error with its reasons. On a GPU a kernel is tried beside the
reference before it serves (longctx.attention.trial). `serving` lists the kernels that take over, in order, what the
first leaves of single calls (longctx.attention.rectangles).
"""

from __future__ import annotations

import logging
from functools import lru_cache

import torch
from torch import Tensor

from longctx.attention import reference
from longctx.attention.flash_attn import FLASH_ATTN_2, FLASH_ATTN_3, FLASH_ATTN_4
from longctx.attention.kernel import Kernel, Problem
from longctx.attention.torch_kernels import CUDNN, TORCH_CPU, TORCH_FLASH
from longctx.attention.trial import failure
from longctx.errors import UserError

log = logging.getLogger("longctx.attention")

_REFERENCE = Kernel("reference", reference.forward, reference.backward, lambda problem: [])
_ORDER = (FLASH_ATTN_3, FLASH_ATTN_4, CUDNN, FLASH_ATTN_2, TORCH_FLASH, TORCH_CPU, _REFERENCE)
KERNELS: dict[str, Kernel] = {kernel.name: kernel for kernel in _ORDER}


def problem_of(q: Tensor, k: Tensor) -> Problem:
    capability = _capability(q.device) if q.is_cuda else (0, 0)
    return Problem(q.device.type, q.dtype, q.shape[3], q.shape[1], k.shape[1], capability)


@lru_cache(maxsize=16)
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def this_machine(head_dim: int = 128, q_heads: int = 32, kv_heads: int = 8) -> Problem:
    """The problem of a bf16 model on this machine's first GPU, or of an fp32 model on its CPU."""
    if torch.cuda.is_available():
        capability = torch.cuda.get_device_capability()
        return Problem("cuda", torch.bfloat16, head_dim, q_heads, kv_heads, capability)
    return Problem("cpu", torch.float32, head_dim, q_heads, kv_heads)


def explain(problem: Problem, *, tried: bool = False) -> dict[str, list[str]]:
    """All kernels in order of preference, each with the reasons why it cannot serve; an empty list: it can.

    tried: whether a kernel without such a reason is also tried, on the GPU of this machine.
    """
    found = {name: kernel.unsupported_reasons(problem) for name, kernel in KERNELS.items()}
    for name, kernel in KERNELS.items() if tried else ():
        if not found[name] and (why := failure(kernel, problem)):
            found[name] = [why]
    return found


@lru_cache(maxsize=64)
def choose(problem: Problem, name: str | None = None) -> Kernel:
    """The named kernel, or without a name the first that can serve; one that fails its trial is passed over.

    Raises ValueError for an unknown name, and with its reasons for a named kernel that cannot serve; UserError for one
    that fails its trial.
    """
    if name is not None:
        if name not in KERNELS:
            raise ValueError(f"kernel={name!r} is not one of {', '.join(KERNELS)}")
        if reasons := KERNELS[name].unsupported_reasons(problem):
            raise ValueError(f"kernel={name!r} cannot serve: {'; '.join(reasons)}")
        if why := failure(KERNELS[name], problem):
            raise UserError(
                f"the attention kernel {name} was asked for and cannot be relied on here: {why}; `longctx doctor` says "
                "which can, and model.attention_kernel=auto takes the first of them (configs/model)"
            )
        return KERNELS[name]
    chosen = next(kernel for kernel in KERNELS.values() if _serves(kernel, problem))
    slow = chosen.name == "reference" and problem.device == "cuda"
    note = ": it forms every score in memory, tens of times slower than a fast kernel" if slow else ""
    log.log(
        logging.WARNING if slow else logging.INFO,
        "attention kernel: %s for %s %s%s", chosen.name, problem.device, problem.dtype, note,
    )  # fmt: skip
    return chosen


@lru_cache(maxsize=64)
def serving(problem: Problem, name: str | None = None) -> tuple[Kernel, ...]:
    """The chosen kernel, and after it those that take what it leaves; the last one takes everything.

    Raises ValueError as `choose` does.
    """
    found = [choose(problem, name)]
    for kernel in KERNELS.values():
        if found[-1].varlen is not None:  # it leaves nothing
            break
        if kernel is not found[0] and _serves(kernel, problem):
            found.append(kernel)
    return tuple(found)


@lru_cache(maxsize=256)
def _serves(kernel: Kernel, problem: Problem) -> bool:
    """Whether a kernel can serve; that one fails its trial is said once."""
    if kernel.unsupported_reasons(problem):
        return False
    if why := failure(kernel, problem):
        log.warning("attention kernel %s is passed over: %s; `longctx doctor` shows all of them", kernel.name, why)
    return not why
