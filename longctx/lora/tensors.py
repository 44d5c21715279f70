"""Lazy reading of safetensors: a model is a table of (shape, dtype, place in a file) until rows are asked
for.

Rows are read with pread into buffers the caller reuses. Mapped pages count as the process's memory and stay
until the kernel wants them back, which is how tools that map a checkpoint come to need as much memory as the
checkpoint is long. Format: https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import torch

from longctx.errors import UserError
from longctx.lora.sources import Source, open_source

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_INTEGERS = {"I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1}
_INTEGERS |= {"U16": 2, "U32": 4, "U64": 8}
BLOCK_BYTES = 16 * 2**20


@dataclass(frozen=True)
class Entry:
    """One tensor: its place is `start` bytes into the data of `file`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    start: int
    nbytes: int

    @property
    def rows(self) -> int:
        return self.shape[0] if self.shape else 1

    @property
    def row_bytes(self) -> int:
        return self.nbytes // max(1, self.rows)

    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]


class Scratch:
    """Named buffers of one worker, grown when needed and otherwise reused: no page is faulted in twice."""

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


class Checkpoint:
    """The tensors and config of a model, or of an adapter, in a local folder or on the hub.

    what: the key the user named it by (`base`, `tuned`, `target`, `adapter`), for messages.
    stem: `model` or `adapter_model`.
    Raises UserError for a missing or truncated file, an index that names an absent shard, and pickles.
    """

    def __init__(self, path: str, *, what: str, stem: str = "model") -> None:
        self.path, self.what, self.stem = path, what, stem
        self.source: Source = open_source(path, what)
        self.files = self._list_files()
        self.entries: dict[str, Entry] = {}
        self._data_start: dict[str, int] = {}
        self._descriptors: dict[str, int] = {}
        self._lock = threading.Lock()
        for file in self.files:
            self._read_header(file)
        self._check_index()

    def config(self, name: str = "config.json") -> dict[str, Any]:
        """A JSON file of the folder; UserError when absent or not JSON."""
        text = self.source.text(name)
        if text is None:
            raise UserError(f"{self.what}={self.path} has no {name}; give a folder in Hugging Face format")
        try:
            return json.loads(text)
        except json.JSONDecodeError as error:
            raise UserError(f"{self.what}={self.path}: {name} is not JSON ({error})") from None

    def read(
        self, name: str, start: int = 0, stop: int | None = None, *, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Rows start..stop of a tensor in the file's dtype. out: bytes to read into."""
        entry = self.entries[name]
        stop = entry.rows if stop is None else stop
        size = (stop - start) * entry.row_bytes
        buffer = torch.empty(size, dtype=torch.uint8) if out is None else out[:size]
        self._pread(entry, start * entry.row_bytes, buffer)
        shape = (stop - start, *entry.shape[1:]) if entry.shape else ()
        return buffer.view(entry.torch_dtype()).view(shape)

    def raw(self, name: str, *, out: torch.Tensor, offset: int, size: int) -> torch.Tensor:
        """`size` bytes of a tensor of any dtype, for copying."""
        buffer = out[:size]
        self._pread(self.entries[name], offset, buffer)
        return buffer

    def require_floats(self) -> None:
        """Refuse quantized weights: their numbers are codes, so neither a difference nor a sum means
        anything.
        """
        for entry in self.entries.values():
            if entry.dtype not in DTYPES and len(entry.shape) >= 2:
                raise UserError(
                    f"{self.what}={self.path} is quantized: {entry.name} is stored as {entry.dtype}, whose "
                    "numbers are "
                    "codes and cannot be subtracted or added; give the checkpoint in bf16, fp16 or fp32 "
                    f"({entry.file})"
                )

    def rename(self, names: Mapping[str, str]) -> None:
        """Give tensors other names; the file keeps its own."""
        self.entries = {
            names.get(name, name): replace(entry, name=names.get(name, name)) for name, entry in self.entries.items()
        }

    def close(self) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _list_files(self) -> list[str]:
        # A single file goes before an index left beside it, as in transformers and peft.
        self._index: dict[str, str] = {}
        single = f"{self.stem}.safetensors"
        if self.source.exists(single):
            return [single]
        index = self.source.text(f"{self.stem}.safetensors.index.json")
        if index is not None:
            try:
                self._index = json.loads(index)["weight_map"]
            except (json.JSONDecodeError, KeyError) as error:
                raise UserError(f"{self.what}={self.path}: the shard index is damaged ({error!r})") from None
            return sorted(set(self._index.values()))
        if any(
            self.source.exists(name)
            for name in ("pytorch_model.bin", "pytorch_model.bin.index.json", "adapter_model.bin")
        ):
            raise UserError(
                f"{self.what}={self.path} holds pickles (.bin), which run code when loaded; convert it to "
                "safetensors first "
                "(`model.save_pretrained(folder)` of transformers or peft does)"
            )
        raise UserError(f"{self.what}={self.path} has no {single} and no index of shards; is it the right folder?")

    def _read_header(self, file: str) -> None:
        for entry in self.source.header(file, self.what):
            if entry["name"] in self.entries:
                raise UserError(f"{self.what}={self.path}: {entry['name']} stands in two shards, {file} and another")
            self.entries[entry["name"]] = Entry(file=file, **entry)
            self._check_entry(self.entries[entry["name"]])

    def _check_entry(self, entry: Entry) -> None:
        itemsize = DTYPES[entry.dtype].itemsize if entry.dtype in DTYPES else _INTEGERS.get(entry.dtype)
        if itemsize is not None and entry.nbytes != prod(entry.shape) * itemsize:
            raise UserError(
                f"{self.what}={self.path}: {entry.name} has {entry.nbytes} bytes where its shape "
                f"{list(entry.shape)} in "
                f"{entry.dtype} needs {prod(entry.shape) * itemsize}; the shard is corrupt, fetch it again "
                f"({entry.file})"
            )

    def _check_index(self) -> None:
        absent = [name for name in self._index if name not in self.entries]
        if absent:
            raise UserError(
                f"{self.what}={self.path}: the index promises {len(absent)} tensors that no shard holds, "
                f"{absent[0]} first; "
                f"fetch {self._index[absent[0]]} again"
            )

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
                    f"{self.what}={self.path}: {entry.file} ends inside {entry.name}; the shard is "
                    "truncated, fetch it again"
                )
            got += count


def row_blocks(entry: Entry, width: int = 4) -> Iterator[tuple[int, int]]:
    """Row ranges of about BLOCK_BYTES each, counting `width` bytes an element."""
    columns = prod(entry.shape[1:])
    step = max(1, BLOCK_BYTES // max(1, columns * width))
    for start in range(0, entry.rows, step):
        yield start, min(entry.rows, start + step)


def bytes_of(buffer: torch.Tensor) -> memoryview:
    """The bytes of a uint8 tensor, without a copy."""
    array: Any = buffer.numpy()
    return memoryview(array)


def _first_bytes(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(8)
