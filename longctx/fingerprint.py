"""What a folder is known by: its content, never its path, so that a result or a run is used again wherever it lies.

Small files are compared as they are, weights by their SHA-256: the hashes of an export or the record of what they were
computed from where longctx wrote one beside them, else read once and remembered per file (path, size and time).
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

RECORD = "made_from.json"  # in a folder whose weights follow from others: their key
WEIGHTS = ("*.safetensors", "*.bin")
MODEL = ("config.json", *WEIGHTS)
TOKENIZER = ("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template*")


def fingerprint_of(values: Mapping[str, Any]) -> str:
    """16 hex digits that differ where the values do."""
    text = json.dumps(values, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def folder_fingerprint(path: str | Path) -> str:
    """The folder's content in 16 hex digits; a hub id stands for itself."""
    folder = Path(path)
    if not folder.is_dir():
        return str(path)
    small = {f.name: f.read_bytes().hex() for f in sorted(folder.glob("*.json"))}
    if "hashes.json" in small or RECORD in small:
        return fingerprint_of(small)
    return fingerprint_of({"small": small, "weights": content_hashes(folder, WEIGHTS)})


def content_hashes(path: str | Path | None, patterns: Iterable[str] = ()) -> dict[str, str]:
    """SHA-256 by name of a folder's files that match the patterns; of a file under the name ""; a hub id as it is."""
    if path is None:
        return {}
    found = Path(path).expanduser()
    if found.is_file():
        return {"": file_hashes([found])[found]}
    if not found.is_dir():
        return {"": str(path)}
    files = sorted({file for pattern in patterns for file in found.glob(pattern) if file.is_file()})
    return {file.name: digest for file, digest in file_hashes(files).items()}


def file_hashes(paths: Iterable[Path]) -> dict[Path, str]:
    """SHA-256 of each file; one that was read before and has the same size and time is not read again."""
    memo = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "longctx" / "hashes.json"
    known: dict[str, list[Any]] = {}
    with suppress(OSError, ValueError):
        known = json.loads(memo.read_text())
    states = {path: [(stat := path.stat()).st_size, stat.st_mtime_ns] for path in paths}
    places = {path: str(path.resolve()) for path in states}
    missing = [path for path, state in states.items() if known.get(places[path], [])[:2] != state]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for path, digest in zip(missing, pool.map(_sha256, missing), strict=True):
            known[places[path]] = [*states[path], digest]
    if missing:
        with suppress(OSError):  # a home that cannot be written costs the reading, nothing else
            memo.parent.mkdir(parents=True, exist_ok=True)
            beside = memo.with_name(f".hashes-{uuid.uuid4().hex}")
            beside.write_text(json.dumps(known))
            os.replace(beside, memo)
    return {path: known[places[path]][2] for path in states}


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
