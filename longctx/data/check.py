"""Check a stage's sources before anything is tokenized: names, files, formats and columns.

The check lists files and reads table headers and a few records. The share of broken records and the documents'
lengths are checked later, when the documents are tokenized (longctx.data.stage_opening).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np

from longctx.config.data import DataConfig, Mix, SourceConfig
from longctx.console import remark
from longctx.data.corpus import held_out
from longctx.data.documents import Tally, Unit
from longctx.data.files import PACKED, read
from longctx.data.shard import bucket_of
from longctx.data.sources import source_units
from longctx.errors import UserError, nearest

_FILES, _RECORDS = 16, 8  # files sampled per source, and records read from each
_LINES, _LARGEST = 2**16, 2**22  # bytes read of a .jsonl, and the size up to which a file is read whole


def sources_of(data: DataConfig, mixes: Iterable[Mix]) -> list[str]:
    """Return the sources that these mixes read from files, including the haystacks of synthetic sources."""
    used = [name for mix in mixes for name, entry in mix.items() if entry.weight > 0]
    return list(dict.fromkeys(str(data.sources[name].haystack or name) for name in used))


def check_sources(data: DataConfig, names: Iterable[str], cache: Path) -> int:
    """Read a sample of each source's files; returns the total size of all files in bytes.

    Hub datasets are checked when they are downloaded. Raises UserError for a source without a readable document.
    """
    size = 0
    known: dict[str, tuple[str, str]] = {}  # of each file, the first source that reads it, and its name there
    read_by: dict[str, list[Unit]] = {}
    for name in names:
        source = data.sources[name]
        if source.kind == "hub" or (source.kind == "chat" and not source.path):
            continue
        units = source_units(name, source, cache)
        size += sum(unit.size for unit in units)
        if data.heldout > 0:
            _warn_of_two_names(name, units, known)
            _warn_of_two_splits(name, units, read_by, data.heldout)
        if source.kind != "stdlib":
            _look_into(name, source, units)
    return size


def _warn_of_two_names(name: str, units: Sequence[Unit], known: dict[str, tuple[str, str]]) -> None:
    """Warn once of a file that another source reads under another name; names decide what is held out."""
    for unit in units:
        other, there = known.setdefault(os.path.abspath(unit.path), (name, unit.name))
        if there != unit.name:
            remark(
                f"data.sources.{other} and data.sources.{name} both read {unit.path}, as {there} and as {unit.name}; a "
                "document is held out by its name, so one may train on what the other holds out: give both the same "
                "path and tell them apart by include and exclude (configs/data)"
            )
            return


def _warn_of_two_splits(name: str, units: Sequence[Unit], read_by: dict[str, list[Unit]], share: float) -> None:
    """Warn once of a file that one source holds out and another trains on.

    That happens where data.heldout holds out less than one document of a source, which then holds out the one with the
    lowest hash: a source of some of another's files may find another lowest. Of files with many documents the hashes
    are not known yet.
    """
    held = _held_files(units, share)
    for other, theirs in read_by.items():
        if held.keys().isdisjoint((unit.path, unit.name) for unit in theirs):
            continue
        before = _held_files(theirs, share)
        apart = [path for (path, file), out in held.items() if before.get((path, file), out) != out]
        if apart:
            remark(
                f"data.sources.{other} and data.sources.{name} both read {apart[0]}, and one of them holds it out and "
                f"the other trains on it: of so few documents data.heldout={share:g} holds out only the one with the "
                "lowest hash in each source; raise data.heldout, or give both sources the same files (configs/data)"
            )
            break
    read_by[name] = list(units)


def _held_files(units: Sequence[Unit], share: float) -> dict[tuple[str, str], bool]:
    """Return whether each file of one group of documents, by path and name, is held out."""
    whole = [unit for unit in units if unit.kind in ("text", "python")]
    buckets = np.array([bucket_of(unit.name) for unit in whole], np.uint32)
    return dict(zip(((unit.path, unit.name) for unit in whole), held_out(buckets, share).tolist(), strict=True))


def check_text_source(data: DataConfig, name: str, key: str) -> None:
    """Raise UserError unless `name` is a source of text; `key` is the config key that holds the name."""
    texts = [known for known, source in data.sources.items() if source.kind != "synth"]
    if name not in texts:
        near = nearest(name, texts)
        hint = f"did you mean {near!r}? " if near else ""
        raise UserError(
            f"{key}={name} is not a source of text in data.sources; {hint}known: {', '.join(texts)}; name one of "
            f"them as {key}=... (configs/data)"
        )


def _quick(unit: Unit) -> bool:
    """Tell whether sampling a unit is cheap: text files and compressed files are read to their end."""
    whole = unit.kind == "text" or unit.path.endswith(PACKED)
    return not whole or unit.size <= _LARGEST


def _beginning(unit: Unit) -> Unit:
    """Limit a .jsonl to its first lines; otherwise a file without the field would be read to its end."""
    return replace(unit, end=min(unit.end, unit.start + _LINES)) if unit.kind == "jsonl" else unit


def _look_into(name: str, source: SourceConfig, units: Sequence[Unit]) -> None:
    """Raise UserError when a file cannot be opened or no sampled record is usable, whatever data.max_bad allows."""
    chosen = [_beginning(unit) for unit in units[:: max(1, len(units) // _FILES)] if _quick(unit)]
    tally, usable = Tally(), 0
    for unit in chosen:
        try:
            with open(unit.path, "rb"):
                pass
        except OSError as error:
            raise UserError(
                f"data.sources.{name}: {unit.path} cannot be read ({error.strerror}); fix its permissions, or leave it "
                "out with exclude"
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
