"""Copies of what a rank saves, in host memory, so that training goes on while a thread writes them."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch

from longctx.host_memory import free_memory
from longctx.model.host import HostMemory
from longctx.train.fragments import Fragment

SHARE = 0.5  # of the host memory that is free, which the copies of a node's ranks may take


class HostCopies:
    """A rank's fragments in host memory, which is kept from one save to the next and page-locked beside a GPU."""

    def __init__(self, device: torch.device) -> None:
        self._memory = HostMemory(device)
        self._buffers: dict[tuple[str, str, int], torch.Tensor] = {}

    def take(self, fragments: Iterable[Fragment]) -> list[Fragment]:
        """Copy the fragments; the copies are complete when this returns, and valid until the next call."""
        copies, on_device = [], False
        for piece in fragments:
            key, data = (piece.kind, piece.name, piece.start), piece.data.detach()
            buffer = self._buffers.get(key)
            if buffer is not None and (buffer.shape, buffer.dtype) != (data.shape, data.dtype):
                self._memory.free([self._buffers.pop(key)])
                buffer = None
            if buffer is None:
                buffer = self._buffers[key] = self._memory.zeros(data.numel(), data.dtype).view(data.shape)
            buffer.copy_(data, non_blocking=data.is_cuda)
            on_device |= data.is_cuda
            copies.append(dataclasses.replace(piece, data=buffer))
        if on_device:
            torch.cuda.current_stream().synchronize()
        return copies

    def free(self) -> None:
        """Give the memory back, once no copy in it is needed any more."""
        self._memory.free(self._buffers.values())
        self._buffers.clear()


class Work(threading.Thread):
    """A function on a thread of its own, or in the caller's (`run`), and the seconds that it took."""

    def __init__(self, function: Callable[[], Any]) -> None:
        super().__init__(name="save", daemon=True)  # a process that ends does not wait for it: the save is void then
        self._function = function
        self._result: Any = None
        self._error: Exception | None = None
        self.seconds = 0.0

    def run(self) -> None:
        began = time.monotonic()
        try:
            self._result = self._function()
        except Exception as error:
            self._error = error
        self.seconds = time.monotonic() - began

    def outcome(self) -> Any:
        """Wait for the thread, if it was started, and return what the function returned or raise what it raised."""
        if self.ident is not None:
            self.join()
        if self._error is not None:
            raise self._error
        return self._result


def copies_fit(fragments: Iterable[Fragment], ranks_per_node: int) -> bool:
    """Whether the free memory of this machine, or of this process's control group, holds such copies of its ranks."""
    needed = sum(piece.data.numel() * piece.data.element_size() for piece in fragments)
    return needed * ranks_per_node <= SHARE * free_memory()
