"""Moves saved tensors to host memory: copies overlap with the computation and return one layer ahead of their use.

Autograd saves a layer's input and its attention output several times, whole and as blocks of tokens. Their storage is
copied once, and the views are recreated when the backward asks for them. On a GPU copies run on their own stream
through page-locked memory, which is kept from one forward pass to the next. On a CPU the "host memory" is a second
copy, which only tests use.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from longctx.model.host import HostMemory


class _HostCopy:
    """The copy of one storage in host memory; `views` counts its saved tensors that backward has not used yet.

    layer: the number of the layer that saved it, in the order of the forward pass. block: host memory of at least the
    storage's size, which goes to `spare` once nothing refers to this copy any more.
    """

    def __init__(self, flat: Tensor, block: Tensor, stream: Any, layer: int, spare: list[Tensor]) -> None:
        self.device, self.block, self.stream, self.layer, self.spare = flat.device, block, stream, layer, spare
        self.views = 0
        self.back: Tensor | None = None
        self.host = block[: flat.numel() * flat.element_size()].view(flat.dtype)
        if stream is None:
            self.host.copy_(flat)
            return
        stream.wait_stream(torch.cuda.current_stream(flat.device))
        with torch.cuda.stream(stream):
            self.host.copy_(flat, non_blocking=True)
        flat.record_stream(stream)

    def __del__(self) -> None:
        self.spare.append(self.block)

    def start(self) -> None:
        """Start copying the storage back to its device, unless that has started."""
        if self.back is not None:
            return
        if self.stream is None:
            self.back = self.host.clone()
            return
        with torch.cuda.stream(self.stream):
            self.back = torch.empty_like(self.host, device=self.device).copy_(self.host, non_blocking=True)

    def take(self) -> Tensor:
        """Return the storage on its device for one view; after the last view the device copy is dropped."""
        self.start()
        assert self.back is not None
        back = self.back
        if self.stream is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_stream(self.stream)
            back.record_stream(current)
        self.views -= 1
        if self.views == 0:
            self.back = None
        return back


@dataclass(frozen=True)
class HostView:
    """A saved tensor as a view of a storage whose copy is in host memory."""

    copy: _HostCopy
    place: int
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


class HostStore:
    """Holds the saved tensors of one model in host memory, in the order of the forward pass.

    A forward pass takes over the memory of earlier ones that no backward pass can ask for any more.
    """

    def __init__(self) -> None:
        self._order: list[_HostCopy] = []
        # The storages that this layer has put, and their places; weak references keep the keys of freed ones taken.
        self._here: dict[int, tuple[StorageWeakRef, int]] = {}
        self._layer = 0
        self._spare: list[Tensor] = []
        self._memory: HostMemory | None = None
        self._streams: dict[torch.device, Any] = {}

    @contextmanager
    def layer(self, *, first: bool) -> Iterator[None]:
        """Move the tensors that autograd saves inside this context to the host; a shared storage is copied once."""
        if first:
            self._order, self._layer = [], 0
        self._here = {}
        self._layer += 1
        with torch.autograd.graph.saved_tensors_hooks(self.put, self.get):
            yield
        self._here = {}

    def put(self, tensor: Tensor) -> HostView | Tensor:
        storage = tensor.untyped_storage()
        if storage.nbytes() == 0:  # torch 2.11's checkpoint saves one, on the CPU whatever the model's device
            return tensor.detach()
        known = self._here.get(storage._cdata)
        place = len(self._order) if known is None else known[1]
        if known is None:
            flat = tensor.detach().as_strided((storage.nbytes() // tensor.element_size(),), (1,), 0)
            self._here[storage._cdata] = (StorageWeakRef(storage), place)
            block = self._block(storage.nbytes(), tensor.device)
            self._order.append(_HostCopy(flat, block, self._stream(tensor.device), self._layer, self._spare))
        away = self._order[place]
        away.views += 1
        return HostView(away, place, tensor.shape, tensor.stride(), int(tensor.storage_offset()))

    def get(self, saved: HostView | Tensor) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        flat = saved.copy.take()
        for away in reversed(self._order[: saved.place]):
            if away.layer < saved.copy.layer - 1:
                break
            if away.views:
                away.start()
        return flat.as_strided(saved.size, saved.stride, saved.offset)

    def _block(self, size: int, device: torch.device) -> Tensor:
        """A spare block of at least `size` bytes, the smallest; without one, the spare blocks give way to a new one."""
        fitting = [at for at, block in enumerate(self._spare) if block.numel() >= size]
        if fitting:
            return self._spare.pop(min(fitting, key=lambda at: self._spare[at].numel()))
        self._memory = self._memory or HostMemory(device)
        self._memory.free(self._spare)
        self._spare.clear()
        return self._memory.bytes(size)

    def _stream(self, device: torch.device) -> Any:
        if device.type != "cuda":
            return None
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        return self._streams[device]
