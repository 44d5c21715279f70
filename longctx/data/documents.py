"""What reading gives: documents, the location of each in its file, and a tally of what could not be read.

Also the reading of one file, plain or compressed, that every kind of source shares.
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

_SHOWN = 5  # mistakes that are kept in words


@dataclass(frozen=True)
class Unit:
    """The smallest thing that a worker reads.

    path: the file. name: the name its documents get. kind: text, python, jsonl, parquet or arrow. column: the column
    of the text or messages. [start, end): bytes, row groups or record batches. size: bytes, for the progress bar.
    """

    path: str
    name: str
    kind: str
    column: str = ""
    start: int = 0
    end: int = 0
    size: int = 0


class Location(NamedTuple):
    """Where a record is: its name, or the name of its .jsonl with the byte at which its line begins (unpacked).

    People are shown a line number. It is counted only when it is shown, because counting reads the file again.
    """

    name: str
    path: str = ""
    byte: int = 0

    def __str__(self) -> str:
        if not self.path:
            return self.name
        try:
            return f"{self.name}:{line_at(Path(self.path), self.byte)}"
        except damaged():  # moved since, or mended
            return f"{self.name} (byte {self.byte})"


@dataclass(frozen=True)
class Document:
    """A document. `group` decides between training and held-out; `content` is text, or messages of a conversation."""

    id: str
    group: str
    content: Any
    location: Location


@dataclass
class Tally:
    """Counts of what was read. seen: documents and broken records. mistakes: the first few, with location and problem."""

    seen: int = 0
    empty: int = 0
    special: int = 0
    broken: int = 0
    not_utf8: int = 0
    mistakes: list[tuple[Location, str]] = field(default_factory=list)

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Tally:
        """A tally out of JSON."""
        return cls(
            **{**values, "mistakes": [(Location(*location), problem) for location, problem in values["mistakes"]]}
        )

    def note(self, location: Location, problem: object) -> None:
        if len(self.mistakes) < _SHOWN:
            self.mistakes.append((location, str(problem)))

    def add(self, other: Tally) -> None:
        for name in ("seen", "empty", "special", "broken", "not_utf8"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.mistakes = (self.mistakes + other.mistakes)[:_SHOWN]

    @property
    def where(self) -> list[str]:
        """The first mistakes in words; counting their line numbers reads their files up to there."""
        return [f"{location}: {problem}" for location, problem in self.mistakes]


def read_text(path: Path, name: str, tally: Tally) -> str | None:
    """The text of a file, or None (counted) when it is not UTF-8 or its compression is damaged."""
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
    """The exceptions that a damaged file raises; some unpackers raise neither OSError nor ValueError."""
    kinds = (OSError, EOFError, ValueError, zlib.error)
    try:
        import zstandard
    except ImportError:
        return kinds
    return (*kinds, zstandard.ZstdError)


def open_unpacked(path: Path) -> io.BufferedIOBase | Any:
    """Open a file for reading bytes; .gz and .zst are unpacked."""
    if path.suffix.lower() == ".gz":
        return gzip.open(path, "rb")
    if path.suffix.lower() == ".zst":
        return io.BufferedReader(_ZstdStream(path))
    return path.open("rb")


class _ZstdStream(io.RawIOBase):
    """A .zst file as a stream of bytes, over all its frames.

    It raises EOFError where the last frame is cut short. zstandard's own reader stops after one frame, and ends
    silently in a cut one.
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
    """The number of the line that begins at a byte, from 1."""
    number, at = 1, 0
    with open_unpacked(path) as stream:
        while at < byte and (line := stream.readline()):
            number, at = number + 1, at + len(line)
    return number
