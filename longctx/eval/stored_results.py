"""Results stored as JSON files, each with the fingerprint of its inputs; a result is reused while it matches."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from longctx.errors import UserError
from longctx.storage.files import read_record, write_text


def load_result(path: Path, key: str) -> dict[str, Any] | None:
    """Return the result in the file, or None when the file is missing or damaged, or has another fingerprint."""
    with suppress(UserError):
        values = read_record(path, "a measured result", "it is measured again")
        if values.get("key") == key:
            return values
    return None


def store_result(path: Path, key: str, values: dict[str, Any]) -> None:
    """Write a result with its fingerprint; a reader sees either the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps({"key": key, **values}, indent=1))
