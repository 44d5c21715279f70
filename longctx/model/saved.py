"""Save policies: activation checkpointing that saves the outputs of chosen operators, or only a layer's input.

`selective_checkpoint` is torch's non-reentrant checkpoint with two dispatch modes. The forward pass saves the outputs
of the chosen operators, and the recomputation replays them in the same order, so attention never runs twice. torch's
own selective checkpointing does the same, but in eager mode it ignores the policy that offloads (2.13). Here a saved
output may be on the device or in host memory.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

from longctx.attention import SAVED_OPS
from longctx.config.model import MemoryConfig
from longctx.model.offload import HostStore, HostView

Chooser = Callable[[Any, tuple[Any, ...]], bool]

_PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)


def attention_only(op: Any, args: tuple[Any, ...]) -> bool:
    """Choose context attention, whose outputs are out and lse."""
    return op in SAVED_OPS


def attention_and_products(op: Any, args: tuple[Any, ...]) -> bool:
    """Choose attention and the products q, k and v (before rotation)."""
    return attention_only(op, args) or op in _PRODUCTS


def widening_products(op: Any, args: tuple[Any, ...]) -> bool:
    """Choose the products whose outputs are wider than their inputs: gate and up.

    o_proj is cheap, and down is not needed again. Where all heads are narrower than the hidden size, o_proj is chosen.
    """
    return op in _PRODUCTS and args[-1].shape[-1] > args[-1].shape[-2]


@dataclass(frozen=True)
class SavePolicy:
    """What one layer saves for its backward pass: the operators of its two regions (None: everything autograd saves).

    block: tokens of a block of the second region. store: the host memory for saved tensors (None: they stay on the
    device). first: whether the forward pass begins with this layer. full: only the layer's input is saved, and both
    regions are recomputed from it, attention included.
    """

    attention: Chooser | None
    feed_forward: Chooser | None
    block: int
    store: HostStore | None = None
    first: bool = False
    full: bool = False

    @classmethod
    def of(
        cls, memory: MemoryConfig, *, block: int, layer: int, layers: int, keep_matmuls: int, store: HostStore | None
    ) -> SavePolicy:
        """The policy of layer `layer` of `layers`; the last `keep_matmuls` layers also save their matrix products."""
        if not memory.activation_checkpointing:
            return cls(None, None, block)
        if not memory.keep_attention:
            return cls(None, _nothing, block, store, layer == 0, full=True)
        if layer >= layers - keep_matmuls:
            return cls(attention_and_products, widening_products, block, store, layer == 0)
        return cls(attention_only, _nothing, block, store, layer == 0)

    @property
    def keeps_products(self) -> bool:
        """Whether q, k and v are saved as the products give them."""
        return self.attention is attention_and_products

    def saving(self) -> Any:
        """The context in which the layer's forward runs."""
        return contextlib.nullcontext() if self.store is None else self.store.layer(first=self.first)


def _nothing(op: Any, args: tuple[Any, ...]) -> bool:
    return False


SAVE_EVERYTHING = SavePolicy(None, None, 0)


class Repetition(contextlib.AbstractContextManager["Repetition", None]):
    """The context in which a checkpointed function runs again; `running` tells the function that it does."""

    running = False

    def __enter__(self) -> Repetition:
        self.running = True
        return self

    def __exit__(self, *error: object) -> None:
        self.running = False


def selective_checkpoint(
    keep: Chooser | None, store: HostStore | None, function: Callable[..., Any], *args: Any
) -> Any:
    """Call `function(*args, repetition)` and recompute it in the backward pass, but save what chosen operators return.

    keep: chooses the operators. Only tensors given directly as arguments pass through saved-tensor hooks; tensors
    inside tuples stay where they are. keep=None calls the function without a checkpoint. The recomputation ends with
    the last tensor that the function saves.
    """
    repetition = Repetition()
    if keep is None or not torch.is_grad_enabled():
        return function(*args, repetition)

    def contexts() -> tuple[Any, Any]:
        if keep is _nothing:
            return contextlib.nullcontext(), repetition
        kept: deque[Any] = deque()
        return _SaveOutputs(keep, kept, store), _ReplayOutputs(keep, kept, store, repetition)

    options: Any = {"use_reentrant": False, "preserve_rng_state": False}
    return checkpoint(function, *args, repetition, context_fn=contexts, **options)


def full_checkpoint(function: Callable[..., Tensor], *args: Any) -> Tensor:
    """Call `function(*args, repetition)` and recompute it in the backward pass from its arguments.

    The function may hold further checkpoints; the recomputation ends with the last argument that they save.
    """
    return selective_checkpoint(_nothing, None, function, *args)


class _SaveOutputs(TorchDispatchMode):
    """Saves the outputs of the chosen operators, in order, during the forward pass."""

    def __init__(self, keep: Chooser, kept: deque[Any], store: HostStore | None) -> None:
        super().__init__()
        self.keep, self.kept, self.store = keep, kept, store

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if self.keep(func, args):
            self.kept.append(tree_map_only(Tensor, self._put, out))
        return out

    def _put(self, tensor: Tensor) -> Tensor | HostView:
        return tensor.detach() if self.store is None else self.store.put(tensor)


class _ReplayOutputs(TorchDispatchMode):
    """A repetition that replays the saved outputs instead of computing them; each can be replayed once."""

    def __init__(self, keep: Chooser, kept: deque[Any], store: HostStore | None, repetition: Repetition) -> None:
        super().__init__()
        self.keep, self.kept, self.store, self.repetition = keep, kept, store, repetition

    def __enter__(self) -> _ReplayOutputs:
        self.repetition.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.repetition.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self.keep(func, args):
            return func(*args, **(kwargs or {}))
        if not self.kept:
            raise RuntimeError(f"the saved output of {func} has been used already; backward ran twice")
        out = self.kept.popleft()
        return out if self.store is None else tree_map_only(HostView, self.store.get, out)
