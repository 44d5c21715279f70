"""A shard: the tokens of some thousand documents in flat files that are written once and then memory-mapped.

tokens.bin   uint16 or uint32, all documents one after another
mask.bin     uint8, 1 for an assistant token (chat only)
starts.npy   int64 [D+1]          names.bin, names.npy   UTF-8 and int64 [D+1]
buckets.npy  uint32 [D], divides training from held-out documents
meta.json    counts, size and SHA-256 of the other files, skipped records; written last
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from longctx.data.documents import Tally
from longctx.errors import UserError
from longctx.storage.files import sync

FORMAT = 2  # raise when the files' layout or the reading of documents changes


@dataclass(frozen=True)
class TokenizedDocument:
    """A document as a shard stores it: tokens uint [T], mask uint8 [T] or None."""

    name: str
    group: str
    tokens: np.ndarray
    mask: np.ndarray | None = None


def bucket_of(group: str) -> int:
    """Map a group to a number in [0, 2^32), which divides training from held-out documents."""
    return int.from_bytes(hashlib.sha256(group.encode("utf-8", "surrogateescape")).digest()[:4], "big")


class _HashedFile:
    """A file of a new shard that is hashed while it is written and synced to the disk when it is closed."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("wb")
        self._digest = hashlib.sha256()

    def write(self, data: bytes) -> None:
        self._digest.update(data)
        self._file.write(data)

    def close(self) -> dict[str, Any]:
        """Close the file; returns its size, SHA-256 and time for meta.json."""
        with self._file:
            self._file.flush()
            os.fsync(self._file.fileno())
        stat = self._path.stat()
        return {"bytes": stat.st_size, "sha256": self._digest.hexdigest(), "modified": stat.st_mtime_ns}


def write_shard(folder: Path, rows: Iterable[TokenizedDocument], dtype: Any, *, masked: bool, tally: Tally) -> None:
    """Write a new shard.

    rows: the documents. dtype: of the stored tokens. masked: write mask.bin. tally: counts of the records read, which
    are complete when `rows` is exhausted.
    """
    folder.mkdir(parents=True)
    lengths: list[int] = []
    names: list[bytes] = []
    buckets: list[int] = []
    top = -1
    files = {name: _HashedFile(folder / name) for name in ("tokens.bin", "mask.bin")[: 1 + masked]}
    for row in rows:
        files["tokens.bin"].write(row.tokens.astype(dtype).tobytes())
        if row.mask is not None:
            files["mask.bin"].write(row.mask.tobytes())
        lengths.append(len(row.tokens))
        names.append(row.name.encode("utf-8", "surrogateescape"))  # file names may not be valid UTF-8
        buckets.append(bucket_of(row.group))
        top = max(top, int(row.tokens.max()))
    small = {
        "starts.npy": _npy(_starts(lengths)),
        "names.npy": _npy(_starts([len(name) for name in names])),
        "buckets.npy": _npy(np.array(buckets, np.uint32)),
        "names.bin": b"".join(names),
    }
    for name, data in small.items():
        files[name] = _HashedFile(folder / name)
        files[name].write(data)
    meta = {
        "documents": len(lengths),
        "tokens": sum(lengths),
        "dtype": np.dtype(dtype).name,
        "largest_id": top,
        "files": {name: file.close() for name, file in files.items()},
        "tally": asdict(tally),
    }
    sync(folder)
    last = _HashedFile(folder / "meta.json")
    last.write(json.dumps(meta, indent=1).encode())
    last.close()
    sync(folder)


def _npy(values: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.save(out, values)
    return out.getvalue()


def _starts(lengths: list[int]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64)


class Shard:
    """The files of one shard, which are memory-mapped when they are first read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.meta: dict[str, Any] = self._read_meta()
        for name, known in self.meta["files"].items():
            self._check(name, known)
        self.starts: np.ndarray = np.load(folder / "starts.npy", mmap_mode="r")
        self.buckets: np.ndarray = np.load(folder / "buckets.npy", mmap_mode="r")

    def _read_meta(self) -> dict[str, Any]:
        try:
            return json.loads((self.folder / "meta.json").read_text(encoding="utf-8"))
        except ValueError:
            raise self._changed("meta.json is no JSON") from None

    def _check(self, name: str, known: dict[str, Any]) -> None:
        """Raise UserError when a file has changed since it was written.

        The size is always compared; the SHA-256 only when the modification time differs.
        """
        path = self.folder / name
        changed = not path.exists() or path.stat().st_size != known["bytes"]
        if not changed and path.stat().st_mtime_ns != known["modified"]:
            with path.open("rb") as stream:
                changed = hashlib.file_digest(stream, "sha256").hexdigest() != known["sha256"]
        if changed:
            raise self._changed(f"{name} should be {known['bytes']} bytes with sha256 {known['sha256'][:12]}...")

    def _changed(self, what: str) -> UserError:
        return UserError(
            f"the shard {self.folder} has changed since it was indexed ({what}); delete that folder, and it is "
            "tokenized again"
        )

    @cached_property
    def tokens(self) -> np.ndarray:
        if not self.meta["tokens"]:
            return np.zeros(0, np.int32)
        return np.asarray(np.memmap(self.folder / "tokens.bin", dtype=self.meta["dtype"], mode="r"))

    @cached_property
    def mask(self) -> np.ndarray | None:
        if "mask.bin" not in self.meta["files"] or not self.meta["tokens"]:
            return None
        return np.asarray(np.memmap(self.folder / "mask.bin", dtype=np.uint8, mode="r"))

    @cached_property
    def _names(self) -> tuple[np.ndarray, np.ndarray]:
        starts = np.load(self.folder / "names.npy", mmap_mode="r")
        return np.asarray(starts), np.asarray(np.memmap(self.folder / "names.bin", dtype=np.uint8, mode="r"))

    def name(self, document: int) -> str:
        starts, text = self._names
        raw = text[int(starts[document]) : int(starts[document + 1])].tobytes()
        return raw.decode("utf-8", "surrogateescape")
