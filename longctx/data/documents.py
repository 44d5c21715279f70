"""Documents, their locations in files, and counts of records that cannot be read.

All kinds of sources share the functions here that read one file, plain or compressed.
"""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from longctx.errors import UserError

_SHOWN = 5  # problems that are kept as text


@dataclass(frozen=True)
class Unit:
    """The smallest amount of input that a worker reads: a file or a part of one.

    path: the file. name: the prefix of its documents' names. kind: text, python, jsonl, parquet or arrow. column: the
    column that holds the text or the messages. [start, end): a range of bytes (jsonl), row groups (parquet) or record
    batches (arrow). size: bytes, for the progress bar.
    """

    path: str
    name: str
    kind: str
    column: str = ""
    start: int = 0
    end: int = 0
    size: int = 0


class Location(NamedTuple):
    """The location of a record, for messages.

    name: the record's name, or the name of its .jsonl file. path, byte: for a .jsonl, the file and the offset of the
    record's line in the uncompressed text. As a string it shows a line number, which is counted only then, because
    counting reads the file again.
    """

    name: str
    path: str = ""
    byte: int = 0

    def __str__(self) -> str:
        if not self.path:
            return self.name
        try:
            return f"{self.name}:{line_at(Path(self.path), self.byte)}"
        except damaged():  # the file was moved or changed since
            return f"{self.name} (byte {self.byte})"


@dataclass(frozen=True)
class Document:
    """One document: `content` is text or a list of messages; `group` decides between training and held-out."""

    id: str
    group: str
    content: Any
    location: Location


@dataclass
class Tally:
    """Counts of the records that were read and of those that were skipped.

    seen: documents and broken records. rewritten: replies in conversations that the chat template shows otherwise once
    others follow. mistakes: location and problem of the first few broken records.
    """

    seen: int = 0
    empty: int = 0
    special: int = 0
    broken: int = 0
    not_utf8: int = 0
    rewritten: int = 0
    mistakes: list[tuple[Location, str]] = field(default_factory=list)

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Tally:
        """Read a tally from the values in a shard's meta.json."""
        counts = {name: value for name, value in values.items() if name != "mistakes"}
        return cls(**counts, mistakes=[(Location(*location), problem) for location, problem in values["mistakes"]])

    def note(self, location: Location, problem: object) -> None:
        if len(self.mistakes) < _SHOWN:
            self.mistakes.append((location, str(problem)))

    def add(self, other: Tally) -> None:
        for name in ("seen", "empty", "special", "broken", "not_utf8", "rewritten"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.mistakes = (self.mistakes + other.mistakes)[:_SHOWN]

    @property
    def where(self) -> list[str]:
        """Return the first problems as text; this reads their files up to each problem to count the lines."""
        return [f"{location}: {problem}" for location, problem in self.mistakes]


def read_text(path: Path, name: str, tally: Tally) -> str | None:
    """Return the text of a file, or None (and count it) when it is not UTF-8 or its compressed data is damaged."""
    tally.seen += 1
    location = Location(name)
    try:
        with open_unpacked(path) as stream:
            return stream.read().decode("utf-8").removeprefix("\ufeff")
    except UserError:
        raise
    except UnicodeDecodeError as error:
        tally.not_utf8 += 1
        tally.note(location, f"not UTF-8 (byte {error.start})")
    except damaged() as error:
        tally.broken += 1
        tally.note(location, error)
    return None


def damaged() -> tuple[type[Exception], ...]:
    """Return the exceptions that reading a damaged file raises; zlib and zstandard have their own."""
    kinds = (OSError, EOFError, ValueError, zlib.error)
    try:
        import zstandard
    except ImportError:
        return kinds
    return (*kinds, zstandard.ZstdError)


def open_unpacked(path: Path) -> io.BufferedIOBase | Any:
    """Open a file for reading bytes; .gz and .zst are decompressed."""
    if path.suffix.lower() == ".gz":
        return gzip.open(path, "rb")
    if path.suffix.lower() == ".zst":
        return io.BufferedReader(_ZstdStream(path))
    return path.open("rb")


class _ZstdStream(io.RawIOBase):
    """A stream of the decompressed bytes of all frames of a .zst file.

    It raises EOFError when the last frame is incomplete. zstandard's own reader stops after the first frame and does
    not report an incomplete one.
    """

    def __init__(self, path: Path) -> None:
        try:
            import zstandard
        except ImportError:
            raise UserError(f"{path} needs the package zstandard; pip install zstandard") from None
        self._library = zstandard.ZstdDecompressor()
        self._file = path.open("rb")
        self._packed, self._frame, self._bytes = b"", None, b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._bytes:
            self._packed = self._packed or self._file.read(1 << 16)
            if not self._packed:
                if self._frame is not None:
                    raise EOFError("the file ends within a compressed frame")
                return 0
            frame: Any = self._frame or self._library.decompressobj()
            self._bytes = frame.decompress(self._packed)
            self._packed, self._frame = (frame.unused_data, None) if frame.eof else (b"", frame)
        count = min(len(buffer), len(self._bytes))
        buffer[:count], self._bytes = self._bytes[:count], self._bytes[count:]
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


def line_at(path: Path, byte: int) -> int:
    """Return the number, from 1, of the line that begins at a byte of the uncompressed file."""
    number, at = 1, 0
    with open_unpacked(path) as stream:
        while at < byte and (line := stream.readline()):
            number, at = number + 1, at + len(line)
    return number
