"""The matrix products of a decoder layer, whose gradients are added where they belong as they are computed.

Several projections of one input add their gradients of that input in one tensor. Gradients of bfloat16 weights are
summed in fp32, by the products themselves, because a sum in bfloat16 would lose digits with every block of tokens: over
all blocks and micro-batches in a weight's `main_grad`, if its engine has given it one (Megatron-LM's name for such an
accumulator; the weight then has no gradient of its own), or else over the blocks of one pass.

Shapes: N rows (batch x tokens), E width of the input, F_i width of an output.
"""

from __future__ import annotations

import logging
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

log = logging.getLogger("longctx.model")


class BlockSums:
    """The sums over `blocks` blocks of one pass of what each block gives to the gradients of narrow weights."""

    def __init__(self, blocks: int) -> None:
        self.blocks = blocks
        self._sums: dict[int, tuple[int, Tensor]] = {}

    def add(self, key: int, grad: Tensor, x: Tensor) -> Tensor | None:
        """Add grad^T x [F, E] to the weight `key`'s sum; with the last block return it in x's dtype."""
        seen, total = self._sums.pop(key, (0, None))
        if total is None:
            total = wide_product(grad.t(), x)
        else:
            add_product(total, grad.t(), x)
        if seen + 1 == self.blocks:
            return total.to(x.dtype)
        self._sums[key] = seen + 1, total
        return None


def project(x: Tensor, *modules: nn.Module, sums: BlockSums | None = None, compute: bool = True) -> tuple[Tensor, ...]:
    """Apply several projections to x [..., E] -> [..., F_i] each.

    Only plain nn.Linear modules are joined; any other (an adapter around one, a module with hooks) is called. sums: of
    the blocks of which x is one. compute=False saves what the backward pass needs and leaves out the products; the
    results are then empty.
    """
    if not all(map(_is_plain, modules)):
        return tuple(module(x) for module in modules)
    targets = [(main_grad(module.weight), id(module)) for module in modules]
    operands = [x.reshape(-1, x.shape[-1]), *(m.weight for m in modules), *(m.bias for m in modules)]
    outputs = _Projections.apply(targets, sums, compute, *autocast(*operands))
    return tuple(out.view(*x.shape[:-1], -1) for out in outputs) if compute else outputs


def autocast(*operands: Any) -> tuple[Any, ...]:
    """The operands of products, each a tensor or None, in the dtype of torch.autocast where it is on."""
    kind = operands[0].device.type
    if not (torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)):
        return operands
    dtype = torch.get_autocast_dtype(kind)
    return tuple(operand if operand is None else operand.to(dtype) for operand in operands)


def _is_plain(module: Any) -> bool:
    return type(module) is nn.Linear and is_bare(module)


def is_bare(module: Any) -> bool:
    """Whether a call of `module` is its class's forward and nothing else: no hook, no forward of its own.

    Sharding (ZeRO-3, FSDP), offloading and whoever watches a module come in by one of these.
    """
    hooks = (module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks)
    return not any(hooks) and "forward" not in vars(module) and not _has_any_global_hook()


class _Projections(torch.autograd.Function):
    """Computes x W_i^T + b_i for each i."""

    @staticmethod
    def forward(
        ctx: Any, targets: list[tuple[Tensor | None, int]], sums: BlockSums | None, compute: bool, x: Tensor, *rest: Any
    ) -> tuple[Tensor, ...]:
        weights, biases = rest[: len(targets)], rest[len(targets) :]
        ctx.targets = targets  # of each weight: its accumulator, and its name among the sums
        ctx.sums = sums if sums is not None and sums.blocks > 1 and x.element_size() < 4 else None
        ctx.save_for_backward(x, *weights)
        if not compute:
            return tuple(x.new_empty(0) for _ in weights)
        return tuple(
            x @ weight.t() if bias is None else torch.addmm(bias, x, weight.t())
            for weight, bias in zip(weights, biases, strict=True)
        )

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        count = len(weights)
        dx: Tensor | None = None
        d_weights: list[Tensor | None] = [None] * count
        d_biases: list[Tensor | None] = [None] * count
        for place in reversed(range(count)):  # autograd's order, so that sums have its bits
            grad = grads[place]
            if ctx.needs_input_grad[3]:
                dx = grad @ weights[place] if dx is None else add_input_gradient(dx, grad, weights[place])
            if ctx.needs_input_grad[4 + place]:
                main, key = ctx.targets[place]
                if main is not None:
                    add_product(main, grad.t(), x)
                else:
                    d_weights[place] = grad.t() @ x if ctx.sums is None else ctx.sums.add(key, grad, x)
            if ctx.needs_input_grad[4 + count + place]:
                d_biases[place] = grad.sum(0)
        return None, None, None, dx, *d_weights, *d_biases


def main_grad(weight: Any) -> Tensor | None:
    """The wide accumulator of a weight's gradient, if its engine has given it one."""
    return getattr(weight, "main_grad", None)


def added(gradient: Tensor | None, main: Tensor | None) -> Tensor | None:
    """The gradient for autograd, or None once it has been added to a weight's accumulator."""
    if gradient is None or main is None:
        return gradient
    main.add_(gradient)
    return None


def add_input_gradient(total: Tensor, grad: Tensor, weight: Tensor) -> Tensor:
    """Add grad @ weight to total, in place; on a GPU within the product, on a CPU with the bits of autograd's sum."""
    return total.addmm_(grad, weight) if total.is_cuda else total.add_(grad @ weight)


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a @ b to total, which may be wider; the product itself adds in fp32 where torch can (on a GPU)."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    elif _adds_inside(total.device, a.dtype):
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total += a @ b


def wide_product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in fp32, which the product itself gives where torch can (on a GPU)."""
    if _adds_inside(a.device, a.dtype):
        return torch.mm(a, b, out_dtype=torch.float32)
    return (a @ b).float()


@lru_cache(maxsize=8)
def _adds_inside(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch's products of `dtype` give fp32 and add to it on this device; tried once, on ones."""
    if device.type != "cuda":
        return False
    ones = torch.ones(16, 16, device=device, dtype=dtype)
    try:
        total = torch.mm(ones, ones, out_dtype=torch.float32)
        torch.addmm(total, ones, ones, out_dtype=torch.float32, out=total)
    except RuntimeError as error:  # what torch raises where a device has no such product
        log.warning("torch cannot add a product in fp32 here (%s); gradients of weights are added afterwards", error)
        return False
    return bool((total == 32).all())
