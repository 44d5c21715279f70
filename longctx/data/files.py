"""Find a source's files, divide them into units, and read the documents of a unit.

A unit is a text file, a byte range of a .jsonl, some row groups of a .parquet or some record batches of an .arrow
file. Units depend on the files alone, not on the number of workers, so that shards can be addressed by content.
"""

from __future__ import annotations

import fnmatch
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from longctx.console import remark
from longctx.data import stdlib
from longctx.data.documents import Document, Location, Tally, Unit, damaged, open_unpacked, read_text
from longctx.errors import UserError

TEXT = (".txt", ".md", ".markdown", ".rst")
ROWS = (".jsonl", ".ndjson", ".parquet", ".arrow")
PACKED = (".gz", ".zst")
RANGE = 64 * 2**20  # bytes of a .jsonl or .parquet in one unit


def find_files(path: str, include: Sequence[str], exclude: Sequence[str], key: str) -> list[tuple[Path, str]]:
    """Return the usable files below `path` (or the file itself), sorted, each with the name its documents get.

    include, exclude: glob patterns over names. key: the config key, for messages. Of a DatasetDict's folder only the
    split train is read, unless `include` chooses. Raises UserError when no usable file exists.
    """
    root = Path(path).expanduser()
    if not root.exists():
        raise UserError(f"{key}={path} does not exist; give a file or folder of {_kinds()}")
    found = [root] if root.is_file() else sorted(_files_below(root, None if include else key))
    base = root.parent if root.is_file() else root
    named = [(p, p.relative_to(base).as_posix()) for p in found if _suffix(p) in TEXT + ROWS]
    kept = [
        (p, name)
        for p, name in named
        if (not include or any(_fits(name, pattern) for pattern in include))
        and not any(_fits(name, pattern) for pattern in exclude)
    ]
    if not kept:
        if named:
            raise UserError(
                f"{key}={path} holds {len(named)} files of {_kinds()}, the first {named[0][1]}, and include="
                f"{list(include)} exclude={list(exclude)} leave out all of them; change the patterns"
            )
        raise UserError(
            f"{key}={path} holds no usable file: of {len(found)} that are not hidden, none is {_kinds()}; "
            "point it at text, or convert yours"
        )
    return kept


def _files_below(root: Path, key: str | None) -> Iterator[Path]:
    """Yield the files below a folder, and then those of folders that are linked there, each folder once.

    Names that begin with a dot are left out, and so are the splits of a DatasetDict other than train, unless `key` is
    None; it is the config key, for messages.
    """
    waiting, seen = [root], set()
    while waiting:
        for at, folders, files in os.walk(waiting.pop(0)):
            if os.path.realpath(at) in seen:
                folders.clear()
                continue
            seen.add(os.path.realpath(at))
            folders[:] = [name for name in folders if not name.startswith(".")]
            if key is not None and "dataset_dict.json" in files:
                folders[:] = _split_to_train_on(Path(at), folders, key)
            files = _own_files(Path(at), files)
            waiting += sorted(path for path in (Path(at, name) for name in folders) if path.is_symlink())
            yield from (path for path in (Path(at, name) for name in files) if path.is_file())


def _split_to_train_on(folder: Path, splits: list[str], key: str) -> list[str]:
    """Return the split train of a folder that DatasetDict.save_to_disk has written, and say what is left out."""
    if "train" not in splits:
        raise UserError(
            f"{folder} is a DatasetDict without a split named train; it has {', '.join(sorted(splits)) or 'none'}: "
            f"name the folder of one, such as {key}={folder / min(splits, default='NAME')}"
        )
    left = sorted(set(splits) - {"train"})
    if left:
        remark(
            f"{folder} is a DatasetDict; its split train is read, and {', '.join(left)} left out (name another split's "
            f"folder as {key}=...)"
        )
    return ["train"]


def _own_files(folder: Path, files: list[str]) -> list[str]:
    """Return the files that are not hidden; of a saved Dataset not the copies that its `map` has left beside it."""
    own = [name for name in files if not name.startswith(".")]
    if "state.json" not in own or "dataset_info.json" not in own:
        return own
    return [name for name in own if not (name.startswith("cache-") and name.endswith(".arrow"))]


def _kinds() -> str:
    return ".txt, .md, .jsonl (each also .gz or .zst), .parquet or .arrow (save_to_disk of the package datasets)"


def _fits(name: str, pattern: str) -> bool:
    return fnmatch.fnmatch(name, pattern) or fnmatch.fnmatch(name.rsplit("/", 1)[-1], pattern)


def _suffix(path: Path) -> str:
    """Return the suffix that tells a file's format, without .gz or .zst."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in PACKED:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def units_of(path: Path, name: str, column: str, *, rows_only: bool = False) -> list[Unit]:
    """Divide a file into units; a compressed file is one unit."""
    suffix, size = _suffix(path), path.stat().st_size
    if suffix in TEXT:
        return [] if rows_only else [Unit(str(path), name, "text", size=size)]
    packed = path.suffix.lower() in PACKED
    if suffix in (".jsonl", ".ndjson"):
        step = size if packed else RANGE
        ranges = [(a, min(a + step, size)) for a in range(0, size, max(step, 1))]
        return [Unit(str(path), name, "jsonl", column, a, b, b - a) for a, b in ranges]
    if packed:
        raise UserError(f"{path} is a compressed {suffix} file; unpack it, {suffix} compresses its own columns")
    return _table_units(path, name, suffix[1:], column, size)


def _table_units(path: Path, name: str, kind: str, column: str, size: int) -> list[Unit]:
    import pyarrow as pa

    try:
        count, columns = _table_shape(path, kind)
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{path} cannot be read as {kind}: {error}; remove or replace the file") from None
    if column not in columns:
        raise UserError(
            f"{path} has no column {column!r}; it has {', '.join(columns)}: set the source's field to one of them"
        )
    step = max(1, round(count * RANGE / max(size, 1)))
    spans = [(a, min(a + step, count)) for a in range(0, count, step)]
    return [Unit(str(path), name, kind, column, a, b, size * (b - a) // count) for a, b in spans]


def _table_shape(path: Path, kind: str) -> tuple[int, list[str]]:
    """Return the number of row groups (or record batches) and the names of the columns."""
    if kind == "parquet":
        import pyarrow.parquet as pq

        meta = pq.ParquetFile(path)
        return meta.metadata.num_row_groups, list(meta.schema_arrow.names)
    import pyarrow as pa

    with pa.memory_map(str(path)) as source, pa.ipc.open_stream(source) as reader:
        return sum(1 for _ in reader), list(reader.schema.names)


def read(unit: Unit, tally: Tally) -> Iterator[Document]:
    """Yield the documents of a unit; records that cannot be read are counted in `tally` and skipped."""
    if unit.kind == "text":
        text = read_text(Path(unit.path), unit.name, tally)
        if text is not None:
            yield Document(unit.name, unit.name, text, Location(unit.name))
    elif unit.kind == "python":
        yield from stdlib.documents(unit, tally)
    elif unit.kind == "jsonl":
        yield from _json_lines(unit, tally)
    else:
        yield from _table_rows(unit, tally)


def _json_lines(unit: Unit, tally: Tally) -> Iterator[Document]:
    """Yield the lines that begin within [start, end), so that units of one file never read the same line."""
    path = Path(unit.path)
    packed = path.suffix.lower() in PACKED
    byte = 0
    errors = damaged()
    with open_unpacked(path) as stream:
        if unit.start and not packed:
            stream.seek(unit.start - 1)
            byte = unit.start - 1 + len(stream.readline())
        while packed or byte < unit.end:
            location = Location(unit.name, unit.path, byte)
            try:
                line = stream.readline()
            except errors as error:
                tally.seen += 1
                tally.broken += 1
                tally.note(location, f"{error}; the rest of the file is skipped")
                return
            if not line:
                return
            byte += len(line)
            document = _json_line(line, unit, location, tally)
            if document is not None:
                yield document


def _json_line(line: bytes, unit: Unit, location: Location, tally: Tally) -> Document | None:
    if not line.strip():
        return None
    tally.seen += 1
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is one too
        tally.broken += 1
        tally.note(location, error)
        return None
    if not isinstance(row, dict) or unit.column not in row:
        tally.broken += 1
        has = f"it has {', '.join(row)}" if isinstance(row, dict) else "it is no object"
        tally.note(location, f"no field {unit.column!r} ({has})")
        return None
    return _content(row[unit.column], f"{location.name}:byte{location.byte}", location, tally)


def _content(value: Any, name: str, location: Location, tally: Tally) -> Document | None:
    if isinstance(value, str | list):
        return Document(name, name, value, location)
    tally.broken += 1
    tally.note(location, f"the field holds {type(value).__name__}, not text or messages")
    return None


def _table_rows(unit: Unit, tally: Tally) -> Iterator[Document]:
    row = 0
    try:
        for first, column in _columns(unit):
            for row, value in enumerate(column, first):
                tally.seen += 1
                name = f"{unit.name}:{row}"
                try:
                    content = value.as_py()
                except UnicodeDecodeError as error:
                    tally.broken += 1
                    tally.note(Location(name), error)
                    continue
                document = _content(content, name, Location(name), tally)
                if document is not None:
                    yield document
            row = first + len(column)
    except (OSError, ValueError) as error:  # pyarrow raises subclasses of both
        tally.seen += 1
        tally.broken += 1
        tally.note(Location(f"{unit.name}:{row}"), f"{error}; the rows after it are skipped")


def _columns(unit: Unit) -> Iterator[tuple[int, Any]]:
    """Yield (number of the first row, column values) of each batch of a unit.

    An empty batch comes first in each row group, so that the caller knows the row number when the group cannot be
    read.
    """
    import pyarrow as pa

    if unit.kind == "parquet":
        import pyarrow.parquet as pq

        table = pq.ParquetFile(unit.path)
        first = sum(table.metadata.row_group(i).num_rows for i in range(unit.start))
        for group in range(unit.start, unit.end):
            yield first, ()
            for batch in table.iter_batches(1024, row_groups=[group], columns=[unit.column]):
                yield first, batch.column(0)
                first += batch.num_rows
        return
    first = 0
    with pa.memory_map(unit.path) as source, pa.ipc.open_stream(source) as reader:
        for number, batch in enumerate(reader):
            if unit.start <= number < unit.end:
                yield first, batch.column(unit.column)
            first += batch.num_rows
