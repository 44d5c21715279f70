"""The tensors of a model, read from its headers: names, types, shapes and places; no weight is read.

Format: https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import prod
from typing import Any

from longctx.errors import UserError
from longctx.storage.model_files import Source, open_source

TORCH_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_ITEMSIZE = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "BOOL": 1}
_ITEMSIZE |= {f"{sign}{8 * size}": size for sign in "IU" for size in (1, 2, 4, 8)}
_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "adapter_model.bin")


@dataclass(frozen=True)
class Entry:
    """One tensor, which begins `start` bytes into the data of `file`."""

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


class Table:
    """The tensors and JSON files of a model, or of an adapter, in a local folder or on the hub.

    what: the config key that names it (`model.path`, `base`, `adapter`), for messages. stem: how the names of its files
    begin, `model` or `adapter_model`. Raises UserError for a missing or truncated file, an index that names an absent
    shard, and pickles.
    """

    def __init__(self, path: str, *, what: str, stem: str = "model") -> None:
        self.path, self.what, self.stem = path, what, stem
        self.source: Source = open_source(path, what)
        self.files = self._list_files()
        self.entries: dict[str, Entry] = {}
        for file in self.files:
            self._read_header(file)
        self._check_index()

    def config(self, name: str = "config.json") -> dict[str, Any]:
        """A JSON file of the folder; raises UserError when it is absent or not a JSON object."""
        return read_object(self.source, name, self.what)

    def require_floats(self) -> None:
        """Refuse quantized weights: their numbers are codes, and differences and sums of codes mean nothing."""
        for entry in self.entries.values():
            if entry.dtype not in TORCH_NAMES and len(entry.shape) >= 2:
                raise UserError(
                    f"{self.what}={self.path} is quantized: {entry.name} is stored as {entry.dtype}, whose numbers "
                    "are codes and cannot be trained, subtracted or added; give the model in bf16, fp16 or fp32 "
                    f"({entry.file})"
                )

    def _list_files(self) -> list[str]:
        # A single file goes before an index left beside it, as in transformers and peft.
        single, index = f"{self.stem}.safetensors", f"{self.stem}.safetensors.index.json"
        self._index: dict[str, str] = {}
        if self.source.exists(single):
            return [single]
        if self.source.exists(index):
            found = read_object(self.source, index, self.what).get("weight_map")
            if not isinstance(found, dict) or not all(isinstance(file, str) for file in found.values()):
                raise UserError(
                    f"{self.what}={self.path}: the shard index is damaged (it has no weight_map); fetch {index} again"
                )
            self._index = found
            return sorted(set(self._index.values()))
        if any(self.source.exists(name) for name in _PICKLES):
            raise UserError(
                f"{self.what}={self.path} holds pickles (.bin), which run code when loaded; convert it to safetensors "
                "first (`model.save_pretrained(folder)` of transformers or peft does)"
            )
        shards = [name for name in self.source.names() if name.endswith(".safetensors")]
        hint = f"; it has {shards[0]}, whose index {index} is missing: fetch it too" if shards else ""
        for other, what in (("model.safetensors", "a model"), ("adapter_model.safetensors", "an adapter")):
            if other in shards and other != single:
                hint = f"; it has {other}, so it is {what}: name the folder of the {self.what}"
        raise UserError(
            f"{self.what}={self.path} has no {single} and no index of shards{hint or ': is it the right folder?'}"
        )

    def _read_header(self, file: str) -> None:
        for found in self.source.header(file, self.what):
            if found["name"] in self.entries:
                raise UserError(f"{self.what}={self.path}: {found['name']} stands in two shards, {file} and another")
            entry = Entry(file=file, **found)
            itemsize = _ITEMSIZE.get(entry.dtype)
            if itemsize is not None and entry.nbytes != prod(entry.shape) * itemsize:
                raise UserError(
                    f"{self.what}={self.path}: {entry.name} has {entry.nbytes} bytes where its shape "
                    f"{list(entry.shape)} in {entry.dtype} needs {prod(entry.shape) * itemsize}; the shard is corrupt, "
                    f"fetch it again ({entry.file})"
                )
            self.entries[entry.name] = entry

    def _check_index(self) -> None:
        absent = [name for name in self._index if name not in self.entries]
        if absent:
            raise UserError(
                f"{self.what}={self.path}: the index promises {len(absent)} tensors that no shard holds, "
                f"{absent[0]} first; fetch {self._index[absent[0]]} again"
            )


def read_object(source: Source, name: str, what: str) -> dict[str, Any]:
    """A JSON object from a folder or repository; raises UserError when it is absent or not an object."""
    text = source.text(name, what)
    if text is None:
        raise UserError(f"{what}={source.name} has no {name}; give a folder in Hugging Face format")
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{what}={source.name}: {name} is not JSON ({error}); fetch it again or mend it") from None
    if not isinstance(found, dict):
        raise UserError(
            f"{what}={source.name}: {name} is a JSON {type(found).__name__} and not an object ({{...}}); fetch it again"
        )
    return found
