"""The checkpoint format that all engines share: pieces of flattened tensors with their offsets.

A fragment is elements [start, start + numel) of a parameter's flattened weight or optimizer moment. An engine writes
the fragments it owns and reads those it needs, so that a run continues on another number of ranks, another dp x cp,
another ZeRO stage or the other engine without a conversion. The files are safetensors: loading them runs no code,
unlike the pickles of DeepSpeed's universal checkpoints.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from longctx.storage.writer import DTYPE_NAMES, SafetensorsWriter

# steps: one number, the optimizer steps a parameter has seen (Adam's bias correction).
Kind = Literal["weight", "exp_avg", "exp_avg_sq", "steps"]
MOMENTS: tuple[Kind, Kind] = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Fragment:
    """Elements [start, start + data.numel()) of the flattened weight or moment (`kind`) of parameter `name`."""

    kind: Kind
    name: str
    start: int
    data: torch.Tensor


def write(path: Path, fragments: Iterator[Fragment], extra: Mapping[str, torch.Tensor]) -> list[dict[str, Any]]:
    """Write one rank's file, one fragment in memory at a time; return the index of its fragments for the manifest."""
    pieces = {f"{piece.kind}/{piece.start}/{piece.name}": piece for piece in fragments if piece.data.numel()}
    tensors = {key: piece.data.detach() for key, piece in pieces.items()}
    tensors |= {f"extra/{name}": value for name, value in extra.items()}
    writer = SafetensorsWriter(path, tensors)
    try:
        # Wide types first, so that every tensor begins at a multiple of its own width, as readers expect.
        for key in sorted(tensors, key=lambda key: -tensors[key].element_size()):
            tensor = tensors[key].to("cpu").contiguous()
            writer.begin(key, "U8" if tensor.dtype == torch.uint8 else DTYPE_NAMES[tensor.dtype], tensor.shape)
            writer.write(tensor)
    finally:
        writer.close()
    return [
        {"key": key, "kind": piece.kind, "name": piece.name, "start": piece.start, "numel": piece.data.numel()}
        for key, piece in pieces.items()
    ]


class FragmentReader:
    """Reads any range of any tensor out of a checkpoint's files, opening each file once."""

    def __init__(self, folder: Path, manifest: Mapping[str, Any]) -> None:
        self.folder = folder
        self.shapes: dict[str, list[int]] = manifest["parameters"]
        self._where: dict[tuple[str, str], list[tuple[int, int, str, str]]] = {}
        for file, entry in manifest["files"].items():
            for item in entry["fragments"]:
                place = (item["start"], item["numel"], file, item["key"])
                self._where.setdefault((item["kind"], item["name"]), []).append(place)
        self._open: dict[str, Any] = {}
        self._stack = ExitStack()

    def __enter__(self) -> FragmentReader:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def read(self, kind: Kind, name: str, start: int, numel: int) -> torch.Tensor:
        """Elements [start, start + numel), flat. Raises KeyError when the checkpoint lacks some of them."""
        parts: list[tuple[int, torch.Tensor]] = []
        found = 0
        for begin, length, file, key in self._where.get((kind, name), []):
            low, high = max(start, begin), min(start + numel, begin + length)
            if low < high:
                piece = self._file(file).get_slice(key)[low - begin : high - begin]
                parts.append((low - start, piece))
                found += high - low
        if found != numel:
            raise KeyError(f"{kind} of {name}: {found} of elements {start} to {start + numel} are in the checkpoint")
        if len(parts) == 1:
            return parts[0][1]
        whole = torch.empty(numel, dtype=parts[0][1].dtype)
        for offset, piece in parts:
            whole[offset : offset + piece.numel()] = piece
        return whole

    def extra(self, file: str, name: str) -> torch.Tensor | None:
        """A rank's own extra tensor (its random state), or None."""
        if not (self.folder / file).exists():
            return None
        handle = self._file(file)
        return handle.get_tensor(f"extra/{name}") if f"extra/{name}" in handle.keys() else None  # noqa: SIM118

    def _file(self, file: str) -> Any:
        from safetensors import safe_open

        if file not in self._open:
            self._open[file] = self._stack.enter_context(safe_open(str(self.folder / file), framework="pt"))
        return self._open[file]
