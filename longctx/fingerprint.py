"""Fingerprints. A cached result is reused only while its fingerprint matches.

A folder's fingerprint depends on its content, not on its path, so a folder can be moved. Small files are included as
they are. Weights are included by SHA-256: from the folder's hashes.json or made_from.json if longctx wrote one and it
still holds, otherwise from hashing the files, which is remembered for each path, size and times (of modification and
of change).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from longctx.errors import UserError
from longctx.storage import hub
from longctx.storage.files import read_record, write_text

RECORD = "made_from.json"  # in a folder of computed weights: the fingerprint of their inputs, and their hashes
_PIECE = 1 << 24
WEIGHTS = ("*.safetensors", "*.bin")
MODEL = ("config.json", *WEIGHTS)
TOKENIZER = ("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template*")


def fingerprint_of(values: Mapping[str, Any]) -> str:
    """Hash values that JSON can hold into 16 hex digits."""
    text = json.dumps(values, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def folder_fingerprint(path: str | Path) -> str:
    """Return the fingerprint of a model folder's content, 16 hex digits; of a hub id, the id with its files' hash."""
    folder = Path(path)
    if not folder.is_dir():
        return hub.revision(str(path))
    small = {f.name: f.read_bytes().hex() for f in sorted(folder.glob("*.json"))}
    if any(_holds(folder / name, folder) for name in ("hashes.json", RECORD) if name in small):
        return fingerprint_of(small)
    return fingerprint_of({"small": small, "weights": content_hashes(folder, WEIGHTS)})


def _holds(record: Path, folder: Path) -> bool:
    """Whether a folder's record still tells its weights, which another program may have replaced.

    Weights that were modified or put in place after the record are read: a copy without its times has the same ones,
    and a file that is moved here keeps its time of modification. The answer is remembered like a file's hash, so that
    they are read once, also where the folder is read-only.
    """
    try:
        read_record(record, "the hashes of a folder's weights", "its weights are read")
    except UserError:
        return False
    noted = record.stat()
    weights = sorted(file for pattern in WEIGHTS for file in folder.glob(pattern))
    if all(_state(file)[1] <= noted.st_mtime_ns and _state(file)[2] <= noted.st_ctime_ns for file in weights):
        return True
    memo, place = _memo(), f"{record.resolve()} holds"
    answers, now = _read_memo(memo), fingerprint_of({file.name: _state(file) for file in (record, *weights)})
    known = answers.get(place, [])
    if known[:1] == [now]:
        return known[1]
    found = _is_record_of(record, folder)  # which may note the hashes of files
    _write_memo(memo, {**_read_memo(memo), place: [now, found]})
    return found


def _is_record_of(record: Path, folder: Path) -> bool:
    """Read a folder's weights, and return whether the record tells the same of them."""
    recorded, found = json.loads(record.read_text(encoding="utf-8")), {}
    if record.name == RECORD:
        recorded, found = recorded.get("weights"), content_hashes(folder, WEIGHTS)
    else:
        with suppress(ValueError, KeyError, RuntimeError):  # of a damaged file, which is refused where it is loaded
            for file in folder.glob("*.safetensors"):
                found.update(tensor_hashes(file))
    return found == recorded


def content_hashes(path: str | Path | None, patterns: Iterable[str] = ()) -> dict[str, str]:
    """Return {name: SHA-256} of a folder's files that match the patterns.

    A single file is returned under the name "", and so is a hub id with its files' hash. None gives an empty dict.
    """
    if path is None:
        return {}
    found = Path(path).expanduser()
    if found.is_file():
        return {"": file_hashes([found])[found]}
    if not found.is_dir():
        return {"": hub.revision(str(path))}
    files = sorted({file for pattern in patterns for file in found.glob(pattern) if file.is_file()})
    return {file.name: digest for file, digest in file_hashes(files).items()}


def file_hashes(paths: Iterable[Path], memo: Path | None = None) -> dict[Path, str]:
    """Return the SHA-256 of each file; a file that was read before with the same size and times is not read again.

    The time of the last change (ctime) also differs when a file is replaced by one with the same modification time.
    memo: the file that remembers the hashes; None: one in the user's cache.
    """
    memo = memo or _memo()
    known = _read_memo(memo)
    states = {path: _state(path) for path in paths}
    places = {path: str(path.resolve()) for path in states}
    missing = [path for path, state in states.items() if known.get(places[path], [])[:3] != state]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for path, digest in zip(missing, pool.map(file_sha256, missing), strict=True):
            known[places[path]] = [*states[path], digest]
    if missing:
        _write_memo(memo, known)
    return {path: known[places[path]][3] for path in states}


def _state(file: Path) -> list[int]:
    """Size, time of modification and time of change of a file, by which one that was read before is known."""
    stat = file.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]


def _memo() -> Path:
    """The file in the user's cache that remembers what was read."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "longctx" / "file_hashes.json"


def _read_memo(memo: Path) -> dict[str, list[Any]]:
    with suppress(OSError, ValueError):
        return json.loads(memo.read_text(encoding="utf-8"))
    return {}


def _write_memo(memo: Path, known: dict[str, list[Any]]) -> None:
    with suppress(OSError):  # without a writable place, files are only read again next time
        memo.parent.mkdir(parents=True, exist_ok=True)
        write_text(memo, json.dumps(known))


def tensor_hashes(path: Path) -> dict[str, str]:
    """Return the SHA-256 of each tensor's bytes in one safetensors file, which is read in pieces."""
    found: dict[str, str] = {}
    with path.open("rb") as file:
        room = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(room))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            start, end = entry["data_offsets"]
            file.seek(8 + room + start)
            digest, left = hashlib.sha256(), end - start
            while left:
                piece = file.read(min(left, _PIECE))
                if not piece:
                    raise RuntimeError(f"{path} ends inside tensor {name}")
                digest.update(piece)
                left -= len(piece)
            found[name] = digest.hexdigest()
    return found


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
