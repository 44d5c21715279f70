"""Save policies: activation checkpointing that saves what chosen operators return, or only a layer's input.

`selective_checkpoint` is torch's non-reentrant checkpoint. The function that it repeats says which outputs outlive the
first run: those of attention and of products that it calls inside `call.keeping()`. The repetition replays them in the
same order, so attention never runs twice. A dispatch mode around the whole function, as torch's own selective
checkpointing has one, sees every operator, which took a quarter of a small layer's host time (docs/log.md); torch's
also ignores a policy that offloads, in eager mode (2.13). Here a saved output may be on the device or in host memory.
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

_KEPT = (*SAVED_OPS, torch.ops.aten.mm.default, torch.ops.aten.addmm.default)


@dataclass(frozen=True)
class SavePolicy:
    """What one layer saves for its backward pass.

    recompute: whether its two regions are checkpoints; without, everything that autograd saves stays. products: the
    regions save what their products return (q, k, v, gate and up), besides attention's out and lse. full: only the
    layer's input is saved, and both regions are recomputed from it, attention included. block: tokens of a block of the
    second region (0: all). store: the host memory for saved tensors (None: they stay on the device). first: whether the
    forward pass begins with this layer.
    """

    recompute: bool = False
    products: bool = False
    full: bool = False
    block: int = 0
    store: HostStore | None = None
    first: bool = False

    @classmethod
    def of(
        cls, memory: MemoryConfig, *, block: int, layer: int, layers: int, keep_matmuls: int, store: HostStore | None
    ) -> SavePolicy:
        """The policy of layer `layer` of `layers`; the last `keep_matmuls` layers also save their matrix products."""
        if not memory.activation_checkpointing:
            return cls(block=block)
        full = not memory.keep_attention
        products = not full and layer >= layers - keep_matmuls
        return cls(True, products, full, block, store, first=layer == 0)

    def saving(self) -> Any:
        """The context in which the layer's forward runs."""
        return contextlib.nullcontext() if self.store is None else self.store.layer(first=self.first)


class CheckpointedCall(contextlib.AbstractContextManager["CheckpointedCall", None]):
    """The runs of one checkpointed function: the first, and inside `with call` its repetition in a backward pass.

    repeats: whether this is a repetition.
    """

    def __init__(self, store: HostStore | None = None, *, keeps: bool = False) -> None:
        self.store, self.keeps, self.repeats = store, keeps, False
        self._kept: deque[Any] = deque()

    def keeping(self, wanted: bool = True) -> Any:
        """A context whose attention and products the first run computes and saves, and the repetition replays.

        Where it is not wanted, or where nothing will be repeated, it does nothing.
        """
        if not (wanted and self.keeps):
            return contextlib.nullcontext()
        return (_ReplayOutputs if self.repeats else _SaveOutputs)(self._kept, self.store)

    def __enter__(self) -> CheckpointedCall:
        self.repeats = True
        return self

    def __exit__(self, *error: object) -> None:
        self.repeats = False


def selective_checkpoint(
    function: Callable[..., Any], *args: Any, store: HostStore | None = None, draws: bool = False
) -> Any:
    """Call `function(*args, call)`; the backward pass repeats all but what it computes inside `call.keeping()`.

    store: where that is saved (None: on its device). draws: whether the function draws random numbers, as an adapter's
    dropout does; the repetition then draws the same ones. Only tensors given directly as arguments pass through
    saved-tensor hooks; tensors inside tuples stay where they are. The repetition ends with the last tensor that the
    function saves.
    """
    if not torch.is_grad_enabled():
        return function(*args, CheckpointedCall())
    call = CheckpointedCall(store, keeps=True)
    options: Any = {"use_reentrant": False, "preserve_rng_state": draws}
    return checkpoint(function, *args, call, context_fn=lambda: (contextlib.nullcontext(), call), **options)


class _SaveOutputs(TorchDispatchMode):
    """Saves the outputs of attention and products, in order, during the forward pass."""

    def __init__(self, kept: deque[Any], store: HostStore | None) -> None:
        super().__init__()
        self.kept, self.store = kept, store

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in _KEPT:
            self.kept.append(tree_map_only(Tensor, self._put, out))
        return out

    def _put(self, tensor: Tensor) -> Tensor | HostView:
        return tensor.detach() if self.store is None else self.store.put(tensor)


class _ReplayOutputs(TorchDispatchMode):
    """Replays the saved outputs instead of computing them; each can be replayed once."""

    def __init__(self, kept: deque[Any], store: HostStore | None) -> None:
        super().__init__()
        self.kept, self.store = kept, store

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in _KEPT:
            return func(*args, **(kwargs or {}))
        if not self.kept:
            raise RuntimeError(f"the saved output of {func} has been used already; backward ran twice")
        out = self.kept.popleft()
        return out if self.store is None else tree_map_only(HostView, self.store.get, out)
