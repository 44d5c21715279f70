"""Results stored as JSON files, each with the fingerprint of its inputs; a result is reused while it matches."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from longctx.storage.files import write_text


def load_result(path: Path, key: str) -> dict[str, Any] | None:
    """Return the result in the file, or None when the file is missing or has another fingerprint."""
    values = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return values if values.get("key") == key else None


def store_result(path: Path, key: str, values: dict[str, Any]) -> None:
    """Write a result with its fingerprint; a reader sees either the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps({"key": key, **values}, indent=1))
