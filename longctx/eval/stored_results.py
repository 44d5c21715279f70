"""Findings kept as JSON files: measured once, and again when the key of what they follow from has changed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from longctx.storage.files import write_text


def load_result(path: Path, key: str) -> dict[str, Any] | None:
    """What the file holds, if it was measured under this key."""
    values = json.loads(path.read_text()) if path.exists() else {}
    return values if values.get("key") == key else None


def store_result(path: Path, key: str, values: dict[str, Any]) -> None:
    """Write the findings; a reader sees the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps({"key": key, **values}, indent=1))
