"""The files of one checkpoint: a rank's own, as it is written, and the check of all of them before they are read."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError

from longctx.fingerprint import file_sha256
from longctx.storage.files import sync
from longctx.train import fragments

if TYPE_CHECKING:
    from longctx.train.fragments import Fragment

FORMAT = 1  # of manifest.json


def write_file(
    path: Path, pieces: Iterable[Fragment], random: dict[str, torch.Tensor]
) -> tuple[dict[str, Any], str | None]:
    """Write and sync one rank's file; returns its entry of the manifest, and the reason why there is none."""
    try:
        index = fragments.write(path, iter(pieces), random)
        sync(path)
        return {"sha256": file_sha256(path), "bytes": path.stat().st_size, "fragments": index}, None
    except (OSError, SafetensorError) as error:
        return {}, f"{path.name}: {error}"


def damage(folder: Path, rank: int, world: int) -> Iterator[str]:
    """A message for each damaged file of a checkpoint among those that this rank checks (every world-th one)."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        entries = {name: (entry["sha256"], entry["bytes"]) for name, entry in manifest["files"].items()}
        entries["state.json"] = (manifest["state_sha256"], None)
        if manifest["format"] != FORMAT:
            yield f"manifest.json has format {manifest['format']}, this version reads {FORMAT}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        yield f"manifest.json cannot be read ({type(error).__name__}: {error})"
        return
    for position, (name, (digest, size)) in enumerate(sorted(entries.items())):
        if position % world != rank:
            continue
        path = folder / name
        try:
            if not path.exists():
                yield f"{name} is missing"
            elif size is not None and path.stat().st_size != size:
                yield f"{name} has {path.stat().st_size} bytes instead of {size}"
            elif file_sha256(path) != digest:
                yield f"{name} does not match its sha256"
        except OSError as error:  # a bad sector
            yield f"{name} cannot be read ({error.strerror})"
