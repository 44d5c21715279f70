"""Reads a model's files, one at a time, from a local folder or from the Hugging Face hub.

From the hub only headers are requested until a shard's rows are read, so a wrong pair of models is refused before
anything large is downloaded.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Protocol

from longctx.errors import UserError
from longctx.storage import hub

_MAX_HEADER = 100 * 2**20
_POINTER = b"version https://git-lfs"


class Source(Protocol):
    name: str

    def exists(self, file: str) -> bool: ...
    def text(self, file: str, what: str) -> str | None: ...
    def fetch(self, file: str) -> Path: ...
    def header(self, file: str, what: str) -> list[dict[str, Any]]: ...
    def names(self) -> list[str]: ...


def open_source(path: str, what: str) -> Source:
    """Open the folder `path`, or the hub repository of that name (`owner/name`)."""
    if Path(path).is_dir():
        return Folder(Path(path))
    looks_like_id = path.count("/") == 1 and not path.startswith((".", "/", "~"))
    if Path(path).exists() or not looks_like_id:
        raise UserError(f"{what}={path} is not a folder, and not a hub id of the form owner/name; check the path")
    with hub.fetching(path, what):
        return Folder(hub.cached(path)) if hub.offline() else Hub(path)


class Folder:
    """A model's files in a local folder."""

    def __init__(self, path: Path) -> None:
        self.path, self.name = path, str(path)

    def exists(self, file: str) -> bool:
        return (self.path / file).is_file()

    def text(self, file: str, what: str) -> str | None:
        return _text(self.path / file, f"{what}={self.path}") if self.exists(file) else None

    def fetch(self, file: str) -> Path:
        return self.path / file

    def names(self) -> list[str]:
        return sorted(entry.name for entry in self.path.iterdir() if entry.is_file())

    def header(self, file: str, what: str) -> list[dict[str, Any]]:
        """The entries (name, dtype, shape, start, nbytes) of one safetensors file, checked against its length."""
        path = self.path / file
        if not path.is_file():
            raise UserError(f"{what}={self.path}: shard {file} is missing though the index names it; fetch it again")
        return read_header(path, f"{what}={self.path}")


def _text(path: Path, where: str) -> str:
    """The content of a text file; raises UserError when it cannot be read as UTF-8 or is a git-lfs pointer."""
    try:
        content = path.read_bytes()
        _refuse_pointer(content, path.name, where)
        return content.decode()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{where}: {path.name} cannot be read ({error}); mend or fetch it again") from None


def _refuse_pointer(beginning: bytes, name: str, where: str) -> None:
    if beginning.startswith(_POINTER):
        raise UserError(
            f"{where}: {name} is a git-lfs pointer, the placeholder that a clone without git-lfs leaves, and not the "
            "file itself; run `git lfs install && git lfs pull` in the folder, or download it again"
        )


def read_header(path: Path, where: str) -> list[dict[str, Any]]:
    """The table of a safetensors file; raises UserError when it is damaged or the file is too short."""
    try:
        return _read_header(path, where)
    except OSError as error:
        raise UserError(f"{where}: {path.name} cannot be read ({error.strerror}); mend its permissions") from None


def _read_header(path: Path, where: str) -> list[dict[str, Any]]:
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        first = file.read(len(_POINTER))
        _refuse_pointer(first, path.name, where)
        file.seek(8)
        length = int.from_bytes(first[:8], "little")
        if size < 8 or length > min(_MAX_HEADER, size - 8):
            raise UserError(f"{where}: {path.name} is not a whole safetensors file ({size} bytes); fetch it again")
        try:
            table = json.loads(file.read(length))
            table.pop("__metadata__", None)
            entries = [
                {
                    "name": name,
                    "dtype": item["dtype"],
                    "shape": tuple(item["shape"]),
                    "start": item["data_offsets"][0],
                    "nbytes": item["data_offsets"][1] - item["data_offsets"][0],
                }
                for name, item in table.items()
            ]
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            raise UserError(f"{where}: the header of {path.name} is damaged; fetch the file again") from None
    end = max((entry["start"] + entry["nbytes"] for entry in entries), default=0)
    if 8 + length + end > size:
        raise UserError(
            f"{where}: {path.name} is truncated: its header promises {8 + length + end} bytes and it has {size}; "
            "fetch it again"
        )
    return sorted(entries, key=lambda entry: entry["start"])


class Hub:
    """A model's files in a hub repository, read through huggingface_hub's cache."""

    def __init__(self, name: str) -> None:
        import huggingface_hub

        self._hub, self.name = huggingface_hub, name
        self._files = set(huggingface_hub.list_repo_files(name))

    def exists(self, file: str) -> bool:
        return file in self._files

    def text(self, file: str, what: str) -> str | None:
        return _text(self.fetch(file), f"{what}={self.name}") if self.exists(file) else None

    def fetch(self, file: str) -> Path:
        return Path(self._hub.hf_hub_download(self.name, file))

    def names(self) -> list[str]:
        return sorted(name for name in self._files if "/" not in name)

    def header(self, file: str, what: str) -> list[dict[str, Any]]:
        if not self.exists(file):
            raise UserError(f"{what}={self.name}: shard {file} is missing though the index names it")
        table = self._hub.HfApi().parse_safetensors_file_metadata(self.name, file)
        return [
            {
                "name": name,
                "dtype": item.dtype,
                "shape": tuple(item.shape),
                "start": item.data_offsets[0],
                "nbytes": item.data_offsets[1] - item.data_offsets[0],
            }
            for name, item in sorted(table.tensors.items(), key=lambda pair: pair[1].data_offsets[0])
        ]
