"""What is wrong with a stage's documents, found before anything is tokenized: names, files, formats, columns.

Files are listed, tables' headers and a few records are read. Shares of broken records and lengths are judged when
the documents are tokenized (longctx.data.stage_opening).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

from longctx.config.data import DataConfig, Mix, SourceConfig
from longctx.data.files import PACKED, Tally, Unit, read
from longctx.data.sources import source_units
from longctx.errors import UserError, nearest

_FILES, _RECORDS = 16, 8  # how many files are looked into, and how many records of each
_LINES, _LARGEST = 2**16, 2**22  # bytes of a .jsonl, and of the largest file that is read whole


def sources_of(data: DataConfig, mixes: Iterable[Mix]) -> list[str]:
    """The sources with files that these mixes read, haystacks of synthetic ones included."""
    used = [name for mix in mixes for name, entry in mix.items() if entry.weight > 0]
    return list(dict.fromkeys(str(data.sources[name].haystack or name) for name in used))


def check_sources(data: DataConfig, names: Iterable[str], cache: Path) -> int:
    """Look at the files of these sources; returns the bytes that would be read.

    Hub datasets are left to their download. Raises UserError for a source without readable documents.
    """
    size = 0
    for name in names:
        source = data.sources[name]
        if source.kind == "hub" or (source.kind == "chat" and not source.path):
            continue
        units = source_units(name, source, cache)
        size += sum(unit.size for unit in units)
        if source.kind != "stdlib":
            _look_into(name, source, units)
    return size


def check_name(data: DataConfig, name: str, key: str) -> None:
    """Raises UserError when `name` is no source of text."""
    texts = [known for known, source in data.sources.items() if source.kind != "synth"]
    if name not in texts:
        near = nearest(name, texts)
        hint = f"did you mean {near!r}? " if near else ""
        raise UserError(f"{key}={name} is not a source of text in data.sources; {hint}known: {', '.join(texts)}")


def _quick(unit: Unit) -> bool:
    """Whether a look costs little: whole texts and packed files are read to their end."""
    whole = unit.kind == "text" or unit.path.endswith(PACKED)
    return not whole or unit.size <= _LARGEST


def _beginning(unit: Unit) -> Unit:
    """The first lines of a .jsonl, for those without the field are passed over until the unit ends."""
    return replace(unit, end=min(unit.end, unit.start + _LINES)) if unit.kind == "jsonl" else unit


def _look_into(name: str, source: SourceConfig, units: Sequence[Unit]) -> None:
    """Refuse a source of which none of the sampled records can be used, whatever share may be broken."""
    chosen = [_beginning(unit) for unit in units[:: max(1, len(units) // _FILES)] if _quick(unit)]
    tally, usable = Tally(), 0
    for unit in chosen:
        try:
            with open(unit.path, "rb"):
                pass
        except OSError as error:
            raise UserError(
                f"data.sources.{name}: {unit.path} cannot be read ({error.strerror}); mend its permissions, or leave "
                "it out with exclude"
            ) from None
        for document in islice(read(unit, tally), _RECORDS):
            usable += bool(document.content.strip() if isinstance(document.content, str) else document.content)
    if not usable and tally.seen:
        what = "conversations" if source.kind == "chat" else "text"
        first = "; ".join(tally.where[:2]) or "all are empty"
        raise UserError(
            f"data.sources.{name}: none of the {tally.seen} records looked at holds {what} ({first}); set "
            f"data.sources.{name}.field to the column with the {what}, or give UTF-8 files ({source.path})"
        )
