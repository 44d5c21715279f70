"""Host memory: blocks of exact size that a GPU copies to and from, and glibc's habit of keeping freed memory.

torch's allocator of pinned memory rounds up to powers of two, so that a block of 2.1 GiB takes 4. A `HostMemory` maps
its blocks itself and registers them with CUDA.

glibc raises its mmap threshold to the largest block ever freed (up to 32 MiB). From then on it places activations of
that size in its heap, between longer-lived blocks, and the process keeps memory that it no longer needs.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import sys
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD = -3, -1
_THRESHOLD = 4 << 20


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A host tensor on a device; on a GPU the copy starts and the host goes on."""
    if device.type == "cuda":  # from pageable memory the host would wait for the device's queue to drain
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


class HostMemory:
    """Blocks of host memory for one device, page-locked if it is a GPU, so that copies need not wait.

    The blocks live until they are freed or this object is.
    """

    def __init__(self, device: torch.device) -> None:
        self._pinned = device.type == "cuda"
        self._blocks: dict[int, Tensor] = {}
        self._end = weakref.finalize(self, _free_all, self._blocks, self._pinned)
        self._end.atexit = False  # the driver unlocks the pages of a process that ends

    def bytes(self, count: int) -> Tensor:
        """A block of `count` bytes, uint8, all zero. Raises MemoryError when the host has no memory left for it."""
        try:
            mapped = mmap.mmap(-1, max(1, count), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            raise MemoryError(f"{count:,} bytes of host memory: {error.strerror}") from error
        with contextlib.suppress(AttributeError, OSError):  # a kernel without huge pages
            mapped.madvise(mmap.MADV_HUGEPAGE)  # half of the time to lock the pages
        block = torch.frombuffer(mapped, dtype=torch.uint8)
        if self._pinned:
            code = int(_runtime().cudaHostRegister(block.data_ptr(), block.numel(), 1))  # 1: for every GPU
            if code:
                _forget_error()
                raise MemoryError(f"CUDA cannot lock {count:,} bytes of host memory (error {code}; ulimit -l)")
        self._blocks[_address(block)] = block
        return block

    def zeros(self, count: int, dtype: torch.dtype) -> Tensor:
        """A block of `count` elements, all zero."""
        return self.bytes(max(1, count) * dtype.itemsize).view(dtype)[:count]

    def free(self, blocks: Iterable[Tensor]) -> None:
        """Free these blocks, once all copies to and from them are complete."""
        _free([self._blocks.pop(_address(block)) for block in blocks], self._pinned)


def _address(block: Tensor) -> int:
    """The address of a block's first byte."""
    return block.untyped_storage().data_ptr()


def _free_all(blocks: dict[int, Tensor], pinned: bool) -> None:
    _free(list(blocks.values()), pinned)
    blocks.clear()


def _free(blocks: list[Tensor], pinned: bool) -> None:
    """Unlock the pages; the mapping goes with the last tensor that uses it."""
    if pinned and blocks:
        torch.cuda.synchronize()
        for block in blocks:
            _runtime().cudaHostUnregister(block.data_ptr())


def _forget_error() -> None:
    """Launch a kernel, which takes the error of a refused call: CUDA keeps it, and torch blames its next kernel."""
    with contextlib.suppress(RuntimeError):
        torch.zeros(1, device="cuda")


def _runtime() -> Any:
    """CUDA's runtime library, as torch offers it."""
    return torch.cuda.cudart()


def return_freed_memory() -> None:
    """Make this process map blocks of 4 MiB and more separately from now on; does nothing without glibc."""
    if not sys.platform.startswith("linux"):
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_MMAP_THRESHOLD, _THRESHOLD)
        libc.mallopt(_M_TRIM_THRESHOLD, _THRESHOLD)
