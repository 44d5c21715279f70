"""Reads safetensors lazily: a model is a table of shapes, dtypes and places in files until rows are requested.

Rows are read with pread into buffers that the caller reuses. Tools that map a file instead can need as much
memory as the file is long, because mapped pages count as the process's memory until the kernel reclaims them.
Format: https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping
from dataclasses import replace
from math import prod
from pathlib import Path

import torch

from longctx.errors import UserError
from longctx.storage.table import Entry, Table
from longctx.storage.writer import DTYPES, bytes_of

BLOCK_BYTES = 16 * 2**20


class Scratch:
    """Named buffers of one worker, which grow when needed and are otherwise reused."""

    def __init__(self) -> None:
        self._buffers: dict[str, torch.Tensor] = {}

    def bytes(self, slot: str, size: int) -> torch.Tensor:
        buffer = self._buffers.get(slot)
        if buffer is None or buffer.numel() < size:
            buffer = self._buffers[slot] = torch.empty(size, dtype=torch.uint8)
        return buffer[:size]

    def floats(self, slot: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        size = prod(shape) * dtype.itemsize
        return self.bytes(slot, size).view(dtype).view(shape)


class StoredTensors(Table):
    """A table of tensors whose rows can be read; as a context manager it closes its files at the end.

    rounding: the dtype to which differences round this side first (None: they take it as it is stored).
    """

    def __init__(self, path: str, *, what: str, stem: str = "model", rounding: torch.dtype | None = None) -> None:
        super().__init__(path, what=what, stem=stem)
        self.rounding = rounding
        self._data_start: dict[str, int] = {}
        self._descriptors: dict[str, int] = {}
        self._lock = threading.Lock()

    def read(
        self, name: str, start: int = 0, stop: int | None = None, *, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Read rows [start, stop) of a tensor in the file's dtype; `out`: bytes to read into."""
        entry = self.entries[name]
        stop = entry.rows if stop is None else stop
        size = (stop - start) * entry.row_bytes
        buffer = torch.empty(size, dtype=torch.uint8) if out is None else out[:size]
        self._pread(entry, start * entry.row_bytes, buffer)
        shape = (stop - start, *entry.shape[1:]) if entry.shape else ()
        return buffer.view(DTYPES[entry.dtype]).view(shape)

    def raw(self, name: str, *, out: torch.Tensor, offset: int, size: int) -> torch.Tensor:
        """Read `size` bytes of a tensor of any dtype, for copying."""
        buffer = out[:size]
        self._pread(self.entries[name], offset, buffer)
        return buffer

    def rename(self, names: Mapping[str, str]) -> None:
        """Rename tensors in this table; the file does not change."""
        self.entries = {
            names.get(name, name): replace(entry, name=names.get(name, name)) for name, entry in self.entries.items()
        }

    def close(self) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def __enter__(self) -> StoredTensors:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open(self, file: str) -> tuple[int, int]:
        with self._lock:
            if file not in self._descriptors:
                path = self.source.fetch(file)
                self._data_start[file] = 8 + int.from_bytes(_first_bytes(path), "little")
                self._descriptors[file] = os.open(path, os.O_RDONLY)
            return self._descriptors[file], self._data_start[file]

    def _pread(self, entry: Entry, offset: int, buffer: torch.Tensor) -> None:
        descriptor, data_start = self._open(entry.file)
        view = bytes_of(buffer)
        place, got = data_start + entry.start + offset, 0
        while got < len(view):
            count = os.preadv(descriptor, [view[got:]], place + got)
            if count == 0:
                raise UserError(
                    f"{self.what}={self.path}: {entry.file} ends inside {entry.name}; the shard is truncated, fetch "
                    "it again"
                )
            got += count


def row_blocks(entry: Entry) -> Iterator[tuple[int, int]]:
    """Yield row ranges [start, stop) of about BLOCK_BYTES each in float32."""
    columns = prod(entry.shape[1:])
    step = max(1, BLOCK_BYTES // max(1, columns * 4))
    for start in range(0, entry.rows, step):
        yield start, min(entry.rows, start + step)


def _first_bytes(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(8)


def squared_norm(block: torch.Tensor) -> float:
    """Compute the squared norm of a matrix of float32 or float64: each row in its dtype, their sum in float64.

    A CPU adds a whole block up in float32. Differences of bfloat16 weights have few distinct values, so those roundings
    do not cancel: over 28 million numbers the sum was 1.5 % off.
    """
    rows = torch.linalg.vector_norm(block, dim=-1).double()
    return float(rows.square().sum())
