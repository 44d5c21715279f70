"""Writes an adapter's factors: to one file, the only form that PEFT reads, or to shards if they exceed max_bytes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from longctx.lora.modules import WeightKind
from longctx.storage.files import write_json
from longctx.storage.writer import SafetensorsWriter


class FactorWriter:
    """Writes A and B of each module under PEFT's names, and starts another shard after max_bytes."""

    def __init__(self, folder: Path, modules: Sequence[str], *, max_bytes: int) -> None:
        self._folder, self._max_bytes = folder, max_bytes
        self._names = [f"base_model.model.{module}.lora_embedding_A" for module in modules for _ in "AB"]
        self._writers: list[SafetensorsWriter] = []
        self._shard_of: dict[str, int] = {}

    def add(self, tensor: str, kind: str, a: Tensor, b: Tensor) -> None:
        """Write one module's factors A [r, in] and B [out, r] (for an embedding, in = vocabulary)."""
        module = f"base_model.model.{tensor.removesuffix('.weight')}"
        suffixes = (
            ("lora_embedding_A", "lora_embedding_B")
            if kind == WeightKind.EMBEDDING.value
            else ("lora_A.weight", "lora_B.weight")
        )
        size = sum(half.numel() * half.element_size() for half in (a, b))
        if not self._writers or self._writers[-1].written + size > self._max_bytes > 0 < self._writers[-1].written:
            self._writers.append(SafetensorsWriter(self._part(len(self._writers) + 1), self._names))
        for suffix, half in zip(suffixes, (a, b), strict=True):
            self._writers[-1].add(f"{module}.{suffix}", half)
            self._shard_of[f"{module}.{suffix}"] = len(self._writers)

    def close(self) -> None:
        for writer in self._writers:
            writer.close()
        count = len(self._writers)
        if count == 1:
            os.rename(self._part(1), self._folder / "adapter_model.safetensors")
            return
        final = {number: f"adapter_model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)}
        for number, name in final.items():
            os.rename(self._part(number), self._folder / name)
        if count:
            index = {
                "metadata": {"total_size": sum(writer.written for writer in self._writers)},
                "weight_map": {name: final[number] for name, number in self._shard_of.items()},
            }
            write_json(self._folder / "adapter_model.safetensors.index.json", index)

    def _part(self, number: int) -> Path:
        return self._folder / f"part-{number:05d}"
