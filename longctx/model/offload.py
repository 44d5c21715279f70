"""Moves saved tensors to host memory: copies overlap with the computation and return one layer ahead of their use.

Autograd saves a layer's input and its attention output several times, whole and as blocks of tokens. Their storage is
copied once, and the views are recreated when the backward asks for them. On a GPU copies run on their own stream
through page-locked memory, which is kept from one forward pass to the next. On a CPU the "host memory" is a second
copy, which only tests use.

The host queues work long before the GPU does it, so device memory is handed over in the order of the queue: a storage
that leaves is kept until two layers later, when the computation waits for its copy, and one that returns is allocated
by the computation's own stream. `Tensor.record_stream` would keep both until the GPU has really come so far, and
every layer's memory would be in use at once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
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
    storage's size, which goes to `spare` once nothing refers to this copy any more. leaving: on a GPU the storage
    itself, which must stay until the copy has been waited for (`left`).
    """

    def __init__(self, flat: Tensor, block: Tensor, stream: Any, layer: int, spare: list[Tensor]) -> None:
        self.device, self.block, self.stream, self.layer, self.spare = flat.device, block, stream, layer, spare
        self.views = 0
        self.back: Tensor | None = None
        self.leaving: Tensor | None = None
        self._computing: Any = None  # the computation's stream, on which this copy's device memory is allocated
        self._returned: Any = None
        self.host = block[: flat.numel() * flat.element_size()].view(flat.dtype)
        if stream is None:
            self.host.copy_(flat)
            return
        self.leaving, self._computing = flat, torch.cuda.current_stream(flat.device)
        self._copied = _beside(stream, lambda: self.host.copy_(flat, non_blocking=True))

    def __del__(self) -> None:
        self.spare.append(self.block)
        if self.back is not None and self._returned is not None:  # fetched and never used: the copy may be under way
            self._computing.wait_event(self._returned)

    def left(self) -> None:
        """Let the computation wait for the copy, and give up the storage."""
        if self.leaving is not None:
            self._computing.wait_event(self._copied)
            self.leaving = None

    def start(self) -> None:
        """Start copying the storage back to its device, unless that has started."""
        if self.back is not None:
            return
        if self.stream is None:
            self.back = self.host.clone()
            return
        self._computing = torch.cuda.current_stream(self.device)
        back = self.back = torch.empty_like(self.host, device=self.device)
        self._returned = _beside(self.stream, lambda: back.copy_(self.host, non_blocking=True))

    def take(self) -> Tensor:
        """Return the storage on its device for one view; after the last view the device copy is dropped."""
        self.start()
        assert self.back is not None
        back = self.back
        if self.stream is not None:
            torch.cuda.current_stream(self.device).wait_event(self._returned)
        self.views -= 1
        if self.views == 0:
            self.back = None
        return back


def _beside(stream: Any, copy: Callable[[], object]) -> Any:
    """Queue `copy` on `stream`, after what the computation has queued so far; returns the event of its end."""
    stream.wait_stream(torch.cuda.current_stream(stream.device))
    with torch.cuda.stream(stream):
        copy()
        return stream.record_event()


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
        self._leaving: deque[_HostCopy] = deque()  # whose storages may still be on the device
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
            self._leave(self._layer)
            self._order, self._layer = [], 0
        self._here = {}
        self._layer += 1
        self._leave(self._layer - 2)
        try:
            with torch.autograd.graph.saved_tensors_hooks(self.put, self.get):
                yield
        except BaseException:
            # After an error no backward pass fetches what this one stored.
            self._leave(self._layer)
            raise
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
            away = _HostCopy(flat, block, self._stream(tensor.device), self._layer, self._spare)
            self._order.append(away)
            self._leaving.append(away)
        away = self._order[place]
        away.views += 1
        return HostView(away, place, tensor.shape, tensor.stride(), int(tensor.storage_offset()))

    def get(self, saved: HostView | Tensor) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        self._leave(self._layer)
        flat = saved.copy.take()
        for away in reversed(self._order[: saved.place]):
            if away.layer < saved.copy.layer - 1:
                break
            if away.views:
                away.start()
        return flat.as_strided(saved.size, saved.stride, saved.offset)

    def _leave(self, layer: int) -> None:
        """Give up the storages that layers up to `layer` have put."""
        while self._leaving and self._leaving[0].layer <= layer:
            self._leaving.popleft().left()

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
