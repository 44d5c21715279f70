"""Short names for what a result was made from, so that a result is used again only where it still holds.

A model or adapter folder is known by its small files and by its weights: by what longctx wrote beside them, the
hashes of an export or the record of what they were computed from, else by their sizes and times. No weight is read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

RECORD = "made_from.json"  # in a folder whose weights follow from others: their key


def key_of(values: Mapping[str, Any]) -> str:
    """16 hex digits that differ where the values do."""
    text = json.dumps(values, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def identity(path: str | Path) -> str:
    """The folder's content in 16 hex digits; a hub id stands for itself."""
    folder = Path(path)
    if not folder.is_dir():
        return str(path)
    small = {f.name: f.read_bytes().hex() for f in sorted(folder.glob("*.json"))}
    if "hashes.json" in small or RECORD in small:
        return key_of(small)
    weights = [file for end in ("*.safetensors", "*.bin") for file in sorted(folder.glob(end))]
    stats = {file.name: [(found := file.stat()).st_size, found.st_mtime_ns] for file in weights}
    return key_of({"small": small, "weights": stats})
