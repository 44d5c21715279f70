"""Writing that a crash cannot spoil: synced files, and replacement by renaming."""

from __future__ import annotations

import json
import os
import uuid
from pathlib import Path
from typing import Any


def sync(path: Path) -> None:
    """Flush a file's bytes, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Replace a small file; a crash leaves either the old content or the new, on the disk."""
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}")
    try:
        beside.write_text(text)
        sync(beside)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def write_json(path: Path, document: Any) -> None:
    """Replace a small JSON file, as `write_text` does."""
    write_text(path, json.dumps(document, indent=2) + "\n")
