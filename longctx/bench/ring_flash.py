"""The zigzag ring of the package ring_flash_attn (PyPI ring-flash-attn), as a peer of longctx's ring.

`import ring_flash_attn` fails in most environments. Its rings import `flash_attn.flash_attn_interface`, and
its `__init__` imports adapters that take `is_flash_attn_greater_or_equal_2_10` from
`transformers.modeling_flash_attention_utils`, a name that transformers 5.0 still has there and 5.23 has not. So its
zigzag module is imported without the `__init__`, and a kernel of longctx may answer the two functions of flash-attn 2
that it calls. Ring, merging and gradients are the package's own code.

Shapes, as flash-attn has them: q, out [B, n, Hq, D], k and v [B, n, Hkv, D], lse [B, Hq, n], for n tokens of a rank.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec, module_from_spec
from types import ModuleType

import torch
import torch.distributed as dist
from torch import Tensor

from longctx.attention.kernel import Kernel, missing_package

PACKAGE = "ring_flash_attn"
INTERFACE = "flash_attn.flash_attn_interface"


def missing() -> str | None:
    """The reason why the package cannot be used, with the remedy, or None."""
    reason = missing_package(PACKAGE, run=False)
    return f"{reason}; `pip install ring-flash-attn` brings it" if reason else None


def zigzag(kernel: Kernel) -> Callable[..., Tensor]:
    """Return the package's `zigzag_ring_flash_attn_func` on top of `kernel`.

    With the kernel flash_attn_2 the package calls flash-attn itself. Any other kernel answers these calls with
    flash-attn 2.8's parameters and copies its gradients to where flash-attn would have written them.
    """
    spec = find_spec(PACKAGE)
    assert spec is not None, missing()
    modules = {PACKAGE: module_from_spec(spec)}  # not executed
    if kernel.name != "flash_attn_2":
        modules |= {"flash_attn": ModuleType("flash_attn"), INTERFACE: _interface(kernel)}
    with _importable(modules):
        return import_module(f"{PACKAGE}.zigzag_ring_flash_attn").zigzag_ring_flash_attn_func


@contextmanager
def _importable(modules: Mapping[str, ModuleType]) -> Iterator[None]:
    """Let imports find `modules` instead of the packages of their names, and restore those afterwards."""
    tops = {name.partition(".")[0] for name in modules}

    def removed() -> dict[str, ModuleType]:
        return {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] in tops}

    before = removed()
    sys.modules.update(modules)
    try:
        yield
    finally:
        removed()
        sys.modules.update(before)


def _interface(kernel: Kernel) -> ModuleType:
    """A module with the two functions of flash-attn 2.8 that the package calls, computed by `kernel`."""

    def _flash_attn_forward(
        q, k, v, dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes,
        return_softmax,
    ):  # fmt: skip
        _plain(dropout_p, window_size_left, window_size_right, softcap, alibi_slopes)
        out, lse = kernel.forward(*_turned(q, k, v), causal=causal, scale=softmax_scale)
        return out.transpose(1, 2), lse.float(), None, None

    def _flash_attn_backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal, window_size_left,
        window_size_right, softcap, alibi_slopes, deterministic, rng_state=None,
    ):  # fmt: skip
        _plain(dropout_p, window_size_left, window_size_right, softcap, alibi_slopes)
        lse = softmax_lse.to(torch.float64 if q.dtype == torch.float64 else torch.float32)
        found = kernel.backward(*_turned(dout, q, k, v, out), lse, causal=causal, scale=softmax_scale)
        for target, gradient in zip((dq, dk, dv), found, strict=True):
            target.copy_(gradient.transpose(1, 2))

    module = ModuleType(INTERFACE)
    module.__dict__.update(_flash_attn_forward=_flash_attn_forward, _flash_attn_backward=_flash_attn_backward)
    return module


def _plain(*options: object) -> None:
    """Assert that dropout, window, soft-cap and slopes are those of plain attention."""
    assert options == (0.0, -1, -1, 0.0, None), options


def _turned(*tensors: Tensor) -> Sequence[Tensor]:
    """[B, S, H, D] -> [B, H, S, D]."""
    return [x.transpose(1, 2) for x in tensors]


@dataclass
class Traffic:
    """The transfers of one rank in order: (receiving rank, bytes) of each tensor that it sends."""

    sent: list[tuple[int, int]] = field(default_factory=list)

    @property
    def bytes(self) -> int:
        return sum(size for _, size in self.sent)


@contextmanager
def counted() -> Iterator[Traffic]:
    """Count what this rank sends through `torch.distributed.batch_isend_irecv`, as both rings do."""
    traffic, original = Traffic(), dist.batch_isend_irecv

    def counting(p2p_op_list: list[dist.P2POp]) -> list[dist.Work]:
        for operation in p2p_op_list:
            if operation.op is dist.isend:
                traffic.sent.append((operation.peer, operation.tensor.nbytes))
        return original(p2p_op_list)

    dist.batch_isend_irecv = counting
    try:
        yield traffic
    finally:
        dist.batch_isend_irecv = original
