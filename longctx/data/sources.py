"""Turn a source's config into the units that are read.

The package `datasets` only downloads hub datasets. Their Arrow files are read by longctx.data.files like local files,
so that every broken record is reported with its file and number.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from longctx.config.data import SourceConfig
from longctx.data.documents import Unit
from longctx.data.files import find_files, units_of
from longctx.data.stdlib import stdlib_files
from longctx.errors import UserError
from longctx.storage import hub
from longctx.storage.files import replacing


def source_units(name: str, source: SourceConfig, cache: Path) -> list[Unit]:
    """Return the units of a source that has files (a synth source has none).

    name: the source's name in the config, for messages. cache: the folder for rows streamed from a hub dataset.
    Raises UserError when there is nothing to read.
    """
    where = f"data.sources.{name}"
    if source.kind == "stdlib":
        files = stdlib_files(Path(source.path) if source.path else None)
        return [Unit(str(path), file, "python", source.field or "", size=path.stat().st_size) for path, file in files]
    if source.path:
        found = find_files(source.path, source.include, source.exclude, f"{where}.path")
    else:
        found = _hub_files(source, cache, where)
    chat = source.kind == "chat"
    units = [unit for path, file in found for unit in units_of(path, file, source.column, rows_only=chat)]
    if not units:
        rule = "conversations come from .jsonl or .parquet" if chat else "all its files are empty"
        what = f"path={source.path}" if source.path else f"name={source.name}"
        raise UserError(f"{where}.{what} holds nothing to read: {rule}; give it documents, or leave the source out")
    return units


def _hub_files(source: SourceConfig, cache: Path, where: str) -> list[tuple[Path, str]]:
    """Return the local files of a hub dataset: its Arrow files, or a .jsonl of its first `rows` rows."""
    try:
        import datasets
        from datasets.exceptions import DatasetsError
    except ImportError:
        raise UserError(f"{where} needs the package datasets; pip install 'longctx[train]'") from None
    name = str(source.name)
    if any((Path(name).expanduser() / mark).is_file() for mark in ("dataset_dict.json", "state.json")):
        raise UserError(
            f"{where}.name={name} is a folder that save_to_disk has written, and kind={source.kind} with a name loads "
            f"a dataset of the hub; read the folder with {where}.path={name} instead"
            f"{'' if source.kind == 'chat' else f' and {where}.kind=text'} (data=text data.path=FOLDER)"
        )
    if not hub.looks_local(name):
        hub.offline()  # without network, datasets then looks into its cache only
    try:
        if source.rows is not None:
            return [(_first_rows(source, cache), f"{name}.jsonl")]
        loaded = datasets.load_dataset(name, source.subset, split=source.split)
    except (ValueError, OSError, DatasetsError) as error:
        raise UserError(
            f"{where}.name={name} (subset={source.subset}, split={source.split}) cannot be loaded: "
            f"{hub.why_not(error, name, dataset=True)}; files that are here are read by data=text data.path=FOLDER"
        ) from None
    files = [Path(entry["filename"]) for entry in loaded.cache_files]
    return [(path, f"{name}/{path.name}") for path in sorted(files)]


def _first_rows(source: SourceConfig, cache: Path) -> Path:
    """Stream the first rows of a hub dataset into a .jsonl, unless it exists; a shorter dataset gives all its rows."""
    import datasets

    what = f"{source.name}|{source.subset}|{source.split}|{source.rows}|{source.column}"
    path = cache / "hub" / f"{hashlib.sha256(what.encode()).hexdigest()[:16]}.jsonl"
    if not path.exists():
        stream = datasets.load_dataset(str(source.name), source.subset, split=source.split, streaming=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as partial, partial.open("w", encoding="utf-8") as out:
            for row in stream.select_columns([source.column]).take(int(source.rows or 0)):
                out.write(json.dumps(row, default=str) + "\n")
    return path
