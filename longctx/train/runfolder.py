"""The run's folder: its resolved config, and what may differ when the same run is continued.

Identity keys (model, data, curriculum, optim, seed) may not change under a run's feet; everything else may.
A change is refused with the differing keys, unless `accept` names it or the user takes a new name.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from longctx.config.base import build
from longctx.config.train import TrainConfig
from longctx.errors import UserError
from longctx.storage.files import write_text

IDENTITY = ("model", "data", "curriculum", "optim", "seed")
# Parts of identity groups that change how fast, not what: they may differ.
FREE_INSIDE = ("model.memory", "model.attention")


def to_dict(config: TrainConfig) -> dict[str, Any]:
    """The resolved config as plain values, as it stands in config.yaml."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))


def fingerprint(config: TrainConfig) -> str:
    """sha256 over every key: what ranks compare."""
    return hashlib.sha256(json.dumps(to_dict(config), sort_keys=True).encode()).hexdigest()


def read(path: Path) -> TrainConfig:
    """A resolved config.yaml, through the same door as any other config."""
    return build(TrainConfig, yaml.safe_load(path.read_text()), origin=str(path))


def prepare(config: TrainConfig) -> Path:
    """Make or continue the run's folder (rank 0, or the launcher): check identity, write config.yaml.

    Raises UserError naming the identity keys that differ from the run already there.
    """
    folder = Path(config.folder)
    stored = folder / "config.yaml"
    if stored.exists():
        before, now = yaml.safe_load(stored.read_text()), to_dict(config)
        changed = [change for change in differences(before, now) if not _accepted(change[0], config.accept)]
        if changed:
            listed = "; ".join(f"{key} was {old!r}, now {new!r}" for key, old, new in changed[:6])
            more = f" and {len(changed) - 6} more" if len(changed) > 6 else ""
            keys = ",".join(key for key, _, _ in changed[:6])
            raise UserError(
                f"{folder} holds a run made by another config: {listed}{more}. Take a new name=..., or, if "
                f"the change is meant, continue with 'accept=[{keys}]' ({stored})"
            )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"run_dir={folder} cannot be made: {error.strerror}; choose another run_dir=") from None
    write_text(stored, yaml.safe_dump(to_dict(config), sort_keys=False))
    return folder


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """The run is this process's alone (rank 0 of a run): two of them would write over each other's checkpoints.

    Raises UserError naming who has it. A file lock, so it ends with the process, whatever ends it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise UserError(
                f"{folder} is being written by {file.read().strip() or 'another process'}; wait for it, end it, or "
                "take a new name=..."
            ) from None
        except OSError:  # a file system without locks
            pass
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """(key, old, new) for every identity key that differs; keys unknown to one side count as absent."""
    old = dict(_leaves({key: before.get(key) for key in IDENTITY}))
    new = dict(_leaves({key: now.get(key) for key in IDENTITY}))
    found = []
    for key in [*new, *(key for key in old if key not in new)]:
        free = any(key == part or key.startswith(part + ".") for part in FREE_INSIDE)
        if not free and old.get(key) != new.get(key):
            found.append((key, old.get(key), new.get(key)))
    return found


def _accepted(key: str, accept: list[str]) -> bool:
    return any(key == item or key.startswith(item + ".") for item in accept)


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from _leaves(inner, f"{path}.{key}" if path else str(key))
    else:
        yield path, value
