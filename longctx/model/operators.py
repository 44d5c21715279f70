"""Whose operators do the element-wise work of a step: torch's, or liger-kernel's once the device has tried them.

The kernels run on a few rows of the model's own widths, beside torch's operators. Triton compiles a kernel for a width
and a dtype, so that the training step finds these compiled.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from longctx.config.model import Fused
from longctx.errors import UserError
from longctx.model.feed_forward import activated
from longctx.model.fused import Operators, able
from longctx.model.loss import token_losses
from longctx.model.norms import TrainedNorm, norm_of_sum
from longctx.model.rotary import rotate

log = logging.getLogger("longctx.model")

REMEDY = "install longctx[gpu], or set model.memory.fused=off (configs/model)"
ROWS = 16
HEAD_ROWS = 1 << 15  # from which on liger-kernel has another kernel for norms as narrow as a head
BARS = {torch.bfloat16: 3e-2, torch.float16: 3e-2, torch.float32: 1e-4}  # relative L2 distance
Case = Callable[[Operators], list[Tensor]]


def check_installed(fused: Fused) -> None:
    """Raise UserError where liger-kernel is asked for and missing."""
    if fused == "liger" and find_spec("liger_kernel") is None:
        raise UserError(f"model.memory.fused=liger needs the package liger-kernel, which is not installed; {REMEDY}")


def choose(fused: Fused, model: nn.Module, device: torch.device) -> Operators:
    """Whose operators run the element-wise work of `model`, a backbone, on this device.

    auto takes liger-kernel where it is installed and its kernels agree with torch's operators, and says why not.
    Raises UserError where it was asked for and they do not agree.
    """
    if fused == "off" or not able(device, next(model.parameters()).dtype):
        return "torch"
    found = against_liger(model, device)
    if not found:
        return "liger"
    if fused == "liger":
        raise UserError(f"model.memory.fused=liger: {found}; {REMEDY}")
    log.warning("%s; torch's operators do the element-wise work, which is slower; %s", found, REMEDY)
    return "torch"


def against_liger(model: nn.Module, device: torch.device) -> str:
    """The reason why liger-kernel's kernels cannot serve `model`, a backbone, on this GPU, or an empty text.

    It is the first kernel that fails or whose values and gradients are not torch's. Of the model, which has
    TrainedLayers, only its config and the types of its modules are used.
    """
    if find_spec("liger_kernel") is None:
        return "liger-kernel is not installed"
    dtype = next(model.parameters()).dtype
    for name, case in _cases(model, device, dtype).items():
        try:
            with _training(device):
                ours, theirs = case("torch"), case("liger")
        except Exception as error:  # whatever a compiler or another version of the package raises
            return f"liger-kernel's {name} fails here ({type(error).__name__}: {str(error)[:200]})"
        distance = max(_distance(a, b) for a, b in zip(theirs, ours, strict=True))
        if not distance <= BARS[dtype]:
            return f"liger-kernel's {name} is {distance:.1e} from torch's (at most {BARS[dtype]:.0e} is rounding)"
    return ""


@contextmanager
def _training(device: torch.device) -> Iterator[None]:
    """With gradients and without autocast, wherever the first pass runs: it may be an evaluation."""
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
        yield


def _distance(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def _cases(model: Any, device: torch.device, dtype: torch.dtype) -> dict[str, Case]:
    config, layer = model.config, model.layers[0]
    norm = next(module for module in layer.modules() if isinstance(module, TrainedNorm))
    hidden, ffn, head_dim = config.hidden_size, config.intermediate_size, layer.self_attn.head_dim
    make = partial(_drawn, device=device, dtype=dtype)

    def norm_case(rows: int, width: int) -> Case:  # of what has no residual: q, k, and the last hidden states
        return lambda operators: _with_gradients(
            lambda x, w: norm_of_sum(operators, x, None, w, norm.epsilon, norm.gemma)[1:],
            make(rows, width),
            make(width),
        )

    heads = {"norm of heads": norm_case(HEAD_ROWS, head_dim)} if hasattr(layer.self_attn, "q_norm") else {}
    return {
        "norm": norm_case(ROWS, hidden), **heads,
        "norm of the residual": lambda operators: _with_gradients(
            lambda x, w: norm_of_sum(operators, x, None, w, norm.epsilon, norm.gemma), make(ROWS, hidden), make(hidden)
        ),
        "norm of a sum": lambda operators: _with_gradients(
            lambda x, y, w: norm_of_sum(operators, x, y, w, norm.epsilon, norm.gemma),
            make(ROWS, hidden), make(ROWS, hidden), make(hidden),
        ),
        "rotation": lambda operators: _with_gradients(
            lambda q, k: rotate(operators, q.clone(), k.clone(), *_angles(head_dim, device, dtype)),
            make(1, ROWS, config.num_attention_heads, head_dim), make(1, ROWS, config.num_key_value_heads, head_dim),
        ),
        "activation": lambda operators: _with_gradients(
            lambda gate, up: (activated(operators, layer.mlp, gate.clone(), up.clone()),),
            make(1, ROWS, ffn), make(1, ROWS, ffn),
        ),
        "loss": lambda operators: _loss(operators, config.vocab_size, make),
    }  # fmt: skip


def _drawn(*shape: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Normal numbers, the same for the same shape."""
    generator = torch.Generator().manual_seed(shape[-1])
    return torch.randn(shape, generator=generator).to(device, dtype).requires_grad_()


def _angles(head_dim: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    angles = torch.arange(ROWS)[None, :, None] * torch.linspace(1, 0.01, head_dim // 2).repeat(2)
    return angles.cos().to(device, dtype), angles.sin().to(device, dtype)


def _with_gradients(function: Callable[..., tuple[Tensor, ...]], *inputs: Tensor) -> list[Tensor]:
    """The outputs and the gradients of the inputs."""
    outputs = function(*inputs)
    given = [torch.ones_like(out) + out.detach() for out in outputs]
    kept = [out.detach().clone() for out in outputs]
    return kept + [grad.detach() for grad in torch.autograd.grad(outputs, inputs, given)]


def _loss(operators: Operators, vocab: int, make: Callable[..., Tensor]) -> list[Tensor]:
    hidden = make(ROWS, 16)
    head = nn.Linear(16, vocab, bias=False, device="meta")
    head.weight = nn.Parameter(make(vocab, 16).detach())
    labels = torch.arange(ROWS, device=hidden.device) % vocab
    weights = torch.linspace(0.5, 1.5, ROWS, device=hidden.device)
    losses = token_losses(hidden, head, labels, weights, chunk=ROWS, z_loss=1e-4, operators=operators)
    return [losses.nll, losses.z_total, *torch.autograd.grad(losses.total, [hidden, head.weight])]
