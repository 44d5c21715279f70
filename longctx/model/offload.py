"""Moves saved tensors to host memory: copies overlap with the computation and return one layer ahead of their use.

Autograd saves a layer's input and its attention output several times, whole and as blocks of tokens. Their storage is
copied once, and the views are recreated when the backward asks for them. On a GPU copies run on their own stream
through pinned memory. On a CPU the "host memory" is a second copy, which only tests use.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_AHEAD = 3  # storages of one layer: its input, the attention output, the lse


class _HostCopy:
    """The copy of one storage in host memory; `views` counts its saved tensors that backward has not used yet."""

    def __init__(self, flat: Tensor, stream: Any) -> None:
        self.device, self.stream, self.views = flat.device, stream, 0
        self.back: Tensor | None = None
        self.host = torch.empty(flat.shape, dtype=flat.dtype, pin_memory=stream is not None)
        if stream is None:
            self.host.copy_(flat)
            return
        stream.wait_stream(torch.cuda.current_stream(flat.device))
        with torch.cuda.stream(stream):
            self.host.copy_(flat, non_blocking=True)
        flat.record_stream(stream)

    def start(self) -> None:
        """Start copying the storage back to its device, unless that has started."""
        if self.back is not None:
            return
        if self.stream is None:
            self.back = self.host
            return
        with torch.cuda.stream(self.stream):
            self.back = self.host.to(self.device, non_blocking=True)

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
    """Holds the saved tensors of one model in host memory, in the order of the forward pass."""

    def __init__(self) -> None:
        self._order: list[_HostCopy] = []
        self._here: dict[int, int] = {}
        self._streams: dict[torch.device, Any] = {}

    @contextmanager
    def layer(self, *, first: bool) -> Iterator[None]:
        """Move the tensors that autograd saves inside this context to the host; a shared storage is copied once."""
        if first:
            self._order = []
        self._here = {}
        with torch.autograd.graph.saved_tensors_hooks(self.put, self.get):
            yield
        self._here = {}

    def put(self, tensor: Tensor) -> HostView:
        storage = tensor.untyped_storage()
        place = self._here.get(storage.data_ptr())
        if place is None:
            flat = tensor.detach().as_strided((storage.nbytes() // tensor.element_size(),), (1,), 0)
            place = self._here[storage.data_ptr()] = len(self._order)
            self._order.append(_HostCopy(flat, self._stream(tensor.device)))
        away = self._order[place]
        away.views += 1
        return HostView(away, place, tensor.shape, tensor.stride(), int(tensor.storage_offset()))

    def get(self, saved: HostView) -> Tensor:
        flat = saved.copy.take()
        for away in self._order[max(0, saved.place - _AHEAD) : saved.place]:
            if away.views:
                away.start()
        return flat.as_strided(saved.size, saved.stride, saved.offset)

    def _stream(self, device: torch.device) -> Any:
        if device.type != "cuda":
            return None
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        return self._streams[device]
