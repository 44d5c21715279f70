"""Writes safetensors as a stream, with one tensor in memory at a time.

The header precedes the data and needs every offset. The writer reserves space for it at the start of the file and fills
it in at the end, so written tensors need not stay in memory.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from longctx.storage.table import TORCH_NAMES

DTYPES: dict[str, torch.dtype] = {code: getattr(torch, name) for code, name in TORCH_NAMES.items()}
DTYPE_NAMES: dict[torch.dtype, str] = {dtype: code for code, dtype in DTYPES.items()}


class SafetensorsWriter:
    """Writes one file: `begin` a tensor, `write` its bytes in order, then the next; `close` writes the header.

    names: every tensor that may be written, from which the size of the header is estimated.
    """

    def __init__(self, path: Path, names: Iterable[str]) -> None:
        self.path = path
        self._room = 1024 + sum(len(json.dumps(name)) + 160 for name in names)
        self._room += -self._room % 8
        self._table: dict[str, dict[str, object]] = {}
        self._file = open(path, "wb")  # noqa: SIM115 - closed by close()
        self._file.seek(8 + self._room)
        self._end = 0

    def begin(self, name: str, dtype: str, shape: Iterable[int]) -> None:
        self._table[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [self._end, self._end]}
        self._current = name

    def write(self, data: torch.Tensor) -> None:
        """Append the bytes of a contiguous CPU tensor to the tensor that was begun last."""
        if data.numel():
            self._file.write(bytes_of(data.reshape(-1).view(torch.uint8)))
        self._end += data.numel() * data.element_size()
        self._table[self._current]["data_offsets"][1] = self._end  # type: ignore[index]

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Write a whole tensor."""
        self.begin(name, DTYPE_NAMES[tensor.dtype], tensor.shape)
        self.write(tensor.contiguous())

    @property
    def written(self) -> int:
        """Bytes of data written so far."""
        return self._end

    def close(self) -> None:
        header = json.dumps({"__metadata__": {"format": "pt"}, **self._table}, separators=(",", ":")).encode()
        assert len(header) <= self._room, "the header outgrew its room"
        self._file.seek(0)
        self._file.write(self._room.to_bytes(8, "little") + header.ljust(self._room))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()


def bytes_of(buffer: torch.Tensor) -> memoryview:
    """The bytes of a uint8 tensor, without a copy."""
    array: Any = buffer.numpy()
    return memoryview(array)
