"""A shard: the tokens of some thousand documents in flat files, written once and memory-mapped ever after.

tokens.bin   uint16 or uint32, all documents one after another
mask.bin     uint8, 1 where the assistant speaks (chat only)
starts.npy   int64 [D+1]          names.bin, names.npy   UTF-8 and int64 [D+1]
buckets.npy  uint32 [D], decides between training and held-out
meta.json    counts, the tokens' SHA-256, what was skipped and why
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from longctx.data.files import Tally
from longctx.errors import UserError

FORMAT = 1  # raise when the files' layout or the reading of documents changes


@dataclass(frozen=True)
class Row:
    """A document as it is stored: tokens uint [T], mask uint8 [T] or None."""

    name: str
    group: str
    tokens: np.ndarray
    mask: np.ndarray | None = None


def bucket_of(group: str) -> int:
    """A number in [0, 2^32) that decides between training and held-out documents."""
    return int.from_bytes(hashlib.sha256(group.encode()).digest()[:4], "big")


def write_shard(folder: Path, rows: Iterable[Row], dtype: Any, *, masked: bool, tally: Tally) -> None:
    """Write a new shard. tally: what reading the rows met, complete once they are consumed."""
    folder.mkdir(parents=True)
    lengths: list[int] = []
    names: list[bytes] = []
    buckets: list[int] = []
    digest = hashlib.sha256()
    top = -1
    with (folder / "tokens.bin").open("wb") as out, (folder / "mask.bin").open("wb") as masks:
        for row in rows:
            data = row.tokens.astype(dtype).tobytes()
            digest.update(data)
            out.write(data)
            if row.mask is not None:
                masks.write(row.mask.tobytes())
            lengths.append(len(row.tokens))
            names.append(row.name.encode())
            buckets.append(bucket_of(row.group))
            top = max(top, int(row.tokens.max()))
        out.flush()
        os.fsync(out.fileno())
    if not masked:
        (folder / "mask.bin").unlink()
    np.save(folder / "starts.npy", _starts(lengths))
    np.save(folder / "names.npy", _starts([len(name) for name in names]))
    np.save(folder / "buckets.npy", np.array(buckets, np.uint32))
    (folder / "names.bin").write_bytes(b"".join(names))
    meta = {
        "documents": len(lengths),
        "tokens": sum(lengths),
        "dtype": np.dtype(dtype).name,
        "largest_id": top,
        "sha256": digest.hexdigest(),
        "modified": (folder / "tokens.bin").stat().st_mtime_ns,
        "tally": asdict(tally),
    }
    (folder / "meta.json").write_text(json.dumps(meta, indent=1))


def _starts(lengths: list[int]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64)


class Shard:
    """One shard's files, opened when first read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.meta: dict[str, Any] = json.loads((folder / "meta.json").read_text())
        self.starts: np.ndarray = np.load(folder / "starts.npy", mmap_mode="r")
        self.buckets: np.ndarray = np.load(folder / "buckets.npy", mmap_mode="r")
        self._check()

    def _check(self) -> None:
        """Raises UserError when the tokens are not those that were indexed."""
        path = self.folder / "tokens.bin"
        size = self.meta["tokens"] * np.dtype(self.meta["dtype"]).itemsize
        changed = not path.exists() or path.stat().st_size != size
        if not changed and path.stat().st_mtime_ns != self.meta["modified"]:
            with path.open("rb") as stream:
                changed = hashlib.file_digest(stream, "sha256").hexdigest() != self.meta["sha256"]
        if changed:
            raise UserError(
                f"the shard {self.folder} has changed since it was indexed ({path.name} should be {size} "
                f"bytes with sha256 {self.meta['sha256'][:12]}...); delete that folder, and it is "
                "tokenized again"
            )

    @cached_property
    def tokens(self) -> np.ndarray:
        if not self.meta["tokens"]:
            return np.zeros(0, np.int32)
        return np.asarray(np.memmap(self.folder / "tokens.bin", dtype=self.meta["dtype"], mode="r"))

    @cached_property
    def mask(self) -> np.ndarray | None:
        path = self.folder / "mask.bin"
        if not path.exists() or not self.meta["tokens"]:
            return None
        return np.asarray(np.memmap(path, dtype=np.uint8, mode="r"))

    @cached_property
    def _names(self) -> tuple[np.ndarray, np.ndarray]:
        starts = np.load(self.folder / "names.npy", mmap_mode="r")
        return np.asarray(starts), np.asarray(np.memmap(self.folder / "names.bin", dtype=np.uint8, mode="r"))

    def name(self, document: int) -> str:
        starts, text = self._names
        return text[int(starts[document]) : int(starts[document + 1])].tobytes().decode()
