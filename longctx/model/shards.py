"""Writes the safetensors shards of an export one tensor at a time, and verifies them by reading them back."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from longctx.fingerprint import tensor_hashes
from longctx.storage.files import write_json
from longctx.storage.writer import SafetensorsWriter, bytes_of


class ShardWriter:
    """Writes `model-0000i-of-0000n.safetensors` and their index into `folder`.

    limit: bytes after which the next shard begins. names: every tensor that may be added, for the header's size.
    """

    def __init__(self, folder: Path, *, limit: int, names: Iterable[str]) -> None:
        self.folder, self.limit = folder, limit
        self.hashes: dict[str, str] = {}
        self._names = list(names)
        self._shards: list[SafetensorsWriter] = []
        self._where: dict[str, int] = {}

    def add(self, name: str, tensor: Tensor) -> None:
        """Append one tensor, which may be freed afterwards; raises ValueError for a name that was added before."""
        if name in self._where:
            raise ValueError(f"tensor {name} was written twice")
        data = tensor.detach().cpu().contiguous()
        size = data.numel() * data.element_size()
        if not self._shards or self._shards[-1].written + size > self.limit > 0 < self._shards[-1].written:
            self._begin()
        self._shards[-1].add(name, data)
        self._where[name] = len(self._shards) - 1
        self.hashes[name] = hashlib.sha256(bytes_of(data.reshape(-1).view(torch.uint8)) if size else b"").hexdigest()

    def close(self) -> None:
        """Finish the last shard, rename the files, and write the index and the hashes."""
        if self._shards:
            self._shards[-1].close()
        count = len(self._shards)
        files = ["model.safetensors"]
        if count != 1:
            files = [f"model-{index + 1:05d}-of-{count:05d}.safetensors" for index in range(count)]
        for shard, file in zip(self._shards, files, strict=True):
            shard.path.rename(self.folder / file)
        total = sum(shard.written for shard in self._shards)
        weight_map = {name: files[index] for name, index in self._where.items()}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(self.folder / "model.safetensors.index.json", index)
        write_json(self.folder / "hashes.json", self.hashes)

    def _begin(self) -> None:
        if self._shards:
            self._shards[-1].close()
        self._shards.append(SafetensorsWriter(self.folder / f"shard-{len(self._shards)}.part", self._names))


def verify(folder: Path, hashes: Mapping[str, str]) -> None:
    """Read back every header and every tensor; raises RuntimeError, which names the first tensor that differs."""
    found: dict[str, str] = {}
    for path in sorted(folder.glob("*.safetensors")):
        for name, digest in tensor_hashes(path).items():
            found[name] = digest
    if missing := sorted(hashes.keys() - found.keys()) or sorted(found.keys() - hashes.keys()):
        raise RuntimeError(f"{folder}: {len(missing)} tensors differ from what was exported, the first {missing[0]}")
    for name, digest in hashes.items():
        if found[name] != digest:
            raise RuntimeError(f"{folder}: {name} reads back differently from what was written; is the disk sound?")
