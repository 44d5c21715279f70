"""Computes the loss of the last hidden states without storing the logits: sum(w x token loss) in chunks of tokens.

The logits of a chunk live in one buffer, which becomes the probabilities and then the gradient. The forward pass
computes the gradients of hidden states and weight (three matrix products, as many as with stored logits) and the
backward pass scales them, so no tensor of size tokens x vocabulary exists and nothing is computed twice. torch's
linear_cross_entropy has neither token weights nor a z-loss in its chunked form (docs/log.md has the times).

Shapes: T tokens, E hidden size, V vocabulary, C tokens of a chunk.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from longctx.attention.merge import accumulator_dtype
from longctx.model.fused import Operators, liger_loss
from longctx.model.host import to_device
from longctx.model.products import add_product, autocast, main_grad

IGNORED = -100


class TokenLosses(NamedTuple):
    """The loss of T tokens.

    total: sum of w x (nll + z lse^2), a scalar with a gradient. nll [T] and z_total have none.
    """

    total: Tensor
    nll: Tensor
    z_total: Tensor


def token_losses(
    hidden: Tensor, head: nn.Module, labels: Tensor, weights: Tensor, *, chunk: int, z_loss: float = 0.0,
    labelled: np.ndarray | None = None, operators: Operators = "torch", even: bool = False,
) -> TokenLosses:  # fmt: skip
    """The weighted loss of `head`'s logits at every labelled token.

    hidden [T, E]; labels [T], -100 for tokens without a label; weights [T]; chunk: tokens at once; labelled: the rows
    of tokens with a label, in order (without them the host waits for a GPU to find them). even: every label has the
    weight 1, which spares liger-kernel's path two multiplications. nll [T] is fp32 (fp64 for fp64 inputs), and 0
    without a label. If no token has a label, the total is a zero that is still connected to `hidden`. A plain Linear
    takes the fast path; any other head (a LoRA around it) is called chunk by chunk under checkpointing, which costs one
    more product.
    """
    weights = weights.to(accumulator_dtype(hidden.dtype))
    if type(head) is nn.Linear:
        rows = (labels != IGNORED).nonzero().squeeze(-1).cpu().numpy() if labelled is None else np.asarray(labelled)
        needed = torch.is_grad_enabled()
        liger = operators == "liger" and needed and head.bias is None
        options = (_chunks(rows, chunk, hidden.device), z_loss, needed, liger, even)
        operands = autocast(hidden, head.weight, head.bias)
        total, nll, z_total = _LinearLoss.apply(*operands, labels, weights, *options, main_grad(head.weight))
        return TokenLosses(total, nll, z_total)
    return _called_loss(hidden, head, labels, weights, chunk, z_loss)


class _LinearLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, weights: Tensor,
        chunks: list[slice | Tensor], z_loss: float, needed: bool, liger: bool, even: bool, main: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        acc = accumulator_dtype(hidden.dtype)
        wants = [needed and flag for flag in ctx.needs_input_grad[:3]]
        d_hidden = torch.zeros_like(hidden) if wants[0] else None
        d_weight = torch.zeros_like(weight, dtype=acc) if wants[1] else None
        d_bias = torch.zeros_like(bias, dtype=acc) if wants[2] and bias is not None else None
        # The weights' part that the backward pass multiplies: under fp16 a mean's 1 / tokens would round gradients to 0
        # here, where torch's GradScaler does not reach.
        narrow = hidden.dtype == torch.float16
        unit = weights.abs().amax().clamp_min(torch.finfo(acc).tiny) if narrow and len(weights) else None
        nll = torch.zeros(hidden.shape[0], dtype=acc, device=hidden.device)
        lse = torch.zeros_like(nll)
        buffer = hidden.new_empty(max(map(_length, chunks), default=0), len(weight))
        for rows in chunks:
            part, label, w = hidden[rows], labels[rows], weights[rows] if unit is None else weights[rows] / unit
            logits = torch.mm(part, weight.t(), out=buffer[: len(part)])
            if liger:
                nll[rows], squared = liger_loss(logits, label, z_loss)
                lse[rows] = squared.sqrt()
                _add_gradients(d_hidden, d_weight, rows, logits, part, weight, None if even else w[:, None])
                continue
            logits = (logits if bias is None else logits.add_(bias)).to(acc)
            top = logits.amax(-1, keepdim=True)
            target = logits.gather(-1, label[:, None])
            total = logits.sub_(top).exp_().sum(-1, keepdim=True)
            part_lse = top + total.log()
            nll[rows], lse[rows] = (part_lse - target).squeeze(-1), part_lse.squeeze(-1)
            if not any(wants):
                continue
            # d(nll + z lse^2)/dlogits = p (1 + 2 z lse) - onehot, all times w; written over the exponentials.
            logits.mul_((1 + 2 * z_loss * part_lse) * w[:, None] / total)
            logits.scatter_add_(-1, label[:, None], -w[:, None])
            gradient = logits if logits.dtype == hidden.dtype else buffer[: len(part)].copy_(logits)
            if d_hidden is not None:
                _set_product(d_hidden, rows, gradient, weight)
            if d_weight is not None:
                add_product(d_weight, gradient.t(), part)
            if d_bias is not None:
                d_bias += logits.sum(0)
        buffer = logits = gradient = None  # freed before the head's gradient is copied to the weight's dtype
        ctx.main, ctx.unit, ctx.dtype = None if d_weight is None else main, unit, weight.dtype
        if unit is None:  # else the sums over tokens are narrowed once they are scaled
            d_weight = d_weight if d_weight is None or ctx.main is not None else d_weight.to(weight.dtype)
            d_bias = d_bias if d_bias is None or bias is None else d_bias.to(bias.dtype)
        ctx.gradients = d_hidden, d_weight, d_bias
        z_total = z_loss * (weights.double() * lse.double().square()).sum()
        total = (weights.double() * nll.double()).sum() + z_total
        ctx.mark_non_differentiable(nll, z_total)
        return total.to(acc), nll, z_total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("the loss computes its gradients in the forward pass, and backward has used them")
        d_hidden, d_weight, d_bias = ctx.gradients
        scale = grads[0] if ctx.unit is None else grads[0] * ctx.unit
        if ctx.main is not None:
            ctx.main.addcmul_(d_weight, scale)
            d_weight = None
        scaled = [made if made is None else _scale(made, scale) for made in (d_hidden, d_weight, d_bias)]
        if ctx.unit is not None:
            scaled = [made if made is None else made.to(ctx.dtype) for made in scaled]
        ctx.gradients = ctx.main = None
        return *scaled, None, None, None, None, None, None, None, None


def _scale(made: Tensor, scale: Tensor) -> Tensor:
    """made *= scale, where `scale` is not rounded to made's dtype, as a tensor without dimensions would be."""
    scale = scale.reshape([1] * made.dim())
    for rows in [made] if made.is_cuda else made.split(8192):  # a CPU copies its operands to float32
        rows.mul_(scale)
    return made


def _chunks(rows: np.ndarray, chunk: int, device: torch.device) -> list[slice | Tensor]:
    """The rows with a label, `chunk` at a time: a slice, which copies nothing, of consecutive ones, or indices."""
    found: list[slice | Tensor] = []
    for start in range(0, len(rows), chunk):
        part = rows[start : start + chunk]
        if part[-1] - part[0] == len(part) - 1:
            found.append(slice(int(part[0]), int(part[-1]) + 1))
        else:
            found.append(to_device(torch.from_numpy(part), device))
    return found


def _length(rows: slice | Tensor) -> int:
    return rows.stop - rows.start if isinstance(rows, slice) else len(rows)


def _add_gradients(
    d_hidden: Tensor | None, d_weight: Tensor | None, rows: slice | Tensor, gradient: Tensor, part: Tensor,
    weight: Tensor, w: Tensor | None,
) -> None:  # fmt: skip
    """Add what a chunk's unweighted gradient [C, V] gives; w [C, 1] scales the narrow side of each product."""
    if d_hidden is not None:
        _set_product(d_hidden, rows, gradient, weight, w)
    if d_weight is not None:
        add_product(d_weight, gradient.t(), part if w is None else (part * w).to(part.dtype))


def _set_product(total: Tensor, rows: slice | Tensor, a: Tensor, b: Tensor, scale: Tensor | None = None) -> None:
    """total[rows] = (a @ b) * scale; the product itself writes there if the rows are consecutive."""
    consecutive = isinstance(rows, slice)
    made = torch.mm(a, b, out=total[rows]) if consecutive else a @ b
    if scale is not None:
        made.mul_(scale)
    if not consecutive:
        total[rows] = made


def _called_loss(
    hidden: Tensor, head: nn.Module, labels: Tensor, weights: Tensor, chunk: int, z_loss: float
) -> TokenLosses:
    acc = accumulator_dtype(hidden.dtype)

    def part_loss(part: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        logits = head(part).to(acc)
        lse = logits.logsumexp(-1)
        picked = logits.gather(-1, label.clamp(min=0)[:, None]).squeeze(-1)
        return torch.where(label == IGNORED, 0.0, lse - picked), torch.where(label == IGNORED, 0.0, lse)

    total = hidden.new_zeros((), dtype=acc)
    z_total = torch.zeros((), dtype=torch.float64, device=hidden.device)
    pieces = []
    for part, label, w in zip(hidden.split(chunk), labels.split(chunk), weights.split(chunk), strict=True):
        nll, lse = checkpoint(part_loss, part, label, use_reentrant=False)  # an adapter's dropout is drawn again
        z_part = z_loss * (w * lse.square()).sum()
        total = total + (w * nll).sum() + z_part
        z_total += z_part.detach().double()
        pieces.append(nll.detach())
    return TokenLosses(total, torch.cat(pieces), z_total)
