"""Safetensors written one tensor at a time, and read back to be sure.

A file's header has to stand before its data, so room for it is kept (the format allows trailing spaces) and
it is filled in when the shard is full: no more than one tensor is ever in memory, and nothing is written
twice.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_ENTRY = 160  # bytes of one header entry beside its name: dtype, up to four dimensions, two offsets
_PIECE = 1 << 24


class ShardWriter:
    """Writes `model-0000i-of-0000n.safetensors` and their index into `folder`.

    limit: bytes of a shard before the next begins. names: how many tensors are coming at most, for the
    header.
    """

    def __init__(self, folder: Path, *, limit: int, names: int) -> None:
        self.folder, self.limit = folder, limit
        self.hashes: dict[str, str] = {}
        self._room = names * _ENTRY
        self._files: list[Path] = []
        self._where: dict[str, int] = {}
        self._total = 0
        self._file: BinaryIO | None = None
        self._header: dict[str, Any] = {}

    def add(self, name: str, tensor: Tensor) -> None:
        """Append one tensor; it may be freed afterwards. Raises ValueError for a name that came before."""
        if name in self._where:
            raise ValueError(f"tensor {name} was written twice")
        data = _bytes_of(tensor)
        if self._file is None or (self._header and self._end() + len(data) > self.limit):
            self._open()
        assert self._file is not None
        start = self._end()
        digest = hashlib.sha256()
        for at in range(0, len(data), _PIECE):
            piece = data[at : at + _PIECE]
            self._file.write(piece)
            digest.update(piece)
        self._header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, start + len(data)],
        }
        self._where[name] = len(self._files) - 1
        self._total += len(data)
        self.hashes[name] = digest.hexdigest()

    def close(self) -> None:
        """Finish the last shard, give the files their names, write the index and the hashes."""
        self._finish()
        count = len(self._files)
        names = ["model.safetensors"]
        if count != 1:
            names = [f"model-{index + 1:05d}-of-{count:05d}.safetensors" for index in range(count)]
        for old, new in zip(self._files, names, strict=True):
            old.rename(self.folder / new)
        weight_map = {name: names[index] for name, index in self._where.items()}
        index = {"metadata": {"total_size": self._total}, "weight_map": weight_map}
        write_json(self.folder / "model.safetensors.index.json", index)
        write_json(self.folder / "hashes.json", self.hashes)

    def _open(self) -> None:
        self._finish()
        path = self.folder / f"shard-{len(self._files)}.part"
        self._files.append(path)
        self._file = path.open("wb")
        self._file.write(b"\0" * (8 + self._reserved()))

    def _finish(self) -> None:
        if self._file is None:
            return
        text = json.dumps({"__metadata__": {"format": "pt"}, **self._header}, separators=(",", ":")).encode()
        if len(text) > self._reserved():
            raise RuntimeError(f"the header of {self._files[-1]} needs {len(text)} bytes, {self._reserved()} were kept")
        self._file.seek(0)
        self._file.write(self._reserved().to_bytes(8, "little") + text.ljust(self._reserved()))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._file, self._header = None, {}

    def _reserved(self) -> int:
        return -(-(self._room + 256) // 8) * 8

    def _end(self) -> int:
        return max((entry["data_offsets"][1] for entry in self._header.values()), default=0)


def _bytes_of(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def verify(folder: Path, hashes: Mapping[str, str]) -> None:
    """Re-read every shard's header and every tensor's bytes; RuntimeError naming the first that differs."""
    found: dict[str, str] = {}
    for path in sorted(folder.glob("*.safetensors")):
        for name, digest in hashes_of(path).items():
            found[name] = digest
    if missing := sorted(hashes.keys() - found.keys()) or sorted(found.keys() - hashes.keys()):
        raise RuntimeError(f"{folder}: {len(missing)} tensors differ from what was exported, the first {missing[0]}")
    for name, digest in hashes.items():
        if found[name] != digest:
            raise RuntimeError(f"{folder}: {name} reads back differently from what was written; is the disk sound?")


def hashes_of(path: Path) -> dict[str, str]:
    """sha256 of every tensor's bytes in one safetensors file, read in pieces."""
    found: dict[str, str] = {}
    with path.open("rb") as file:
        room = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(room))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            start, end = entry["data_offsets"]
            file.seek(8 + room + start)
            digest, left = hashlib.sha256(), end - start
            while left:
                piece = file.read(min(left, _PIECE))
                if not piece:
                    raise RuntimeError(f"{path} ends inside tensor {name}")
                digest.update(piece)
                left -= len(piece)
            found[name] = digest.hexdigest()
    return found


def write_json(path: Path, document: Any) -> None:
    """Write and sync, so that a later rename of the folder publishes complete files."""
    with path.open("w") as file:
        json.dump(document, file, indent=2)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
