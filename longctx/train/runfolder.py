"""The run's folder: its resolved config, the hashes of its inputs, and the check of both when a run is continued.

The identity keys (model, data, curriculum, optim, seed) must not change during a run; all others may. Where such a key
is a path, the content of the files decides (inputs.json has their hashes), so that a run, its model and its documents
may be moved. A change is refused with the differing keys, unless `accept` names it or the user takes a new name. A run
without a checkpoint has no identity yet: its config is replaced.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from longctx import console
from longctx import dtype as dtypes
from longctx.config.base import build
from longctx.config.train import IDENTITY, TrainConfig
from longctx.distributed.launcher import node_name, started_by
from longctx.errors import UserError
from longctx.fingerprint import WEIGHTS
from longctx.signals import sweep
from longctx.storage.files import read_record, write_text
from longctx.train.identity import IdentityChange, accepted, differences, hashes_of, inputs_of, other_files

INPUTS = "inputs.json"  # in the run's folder: per key that names files, their hashes
WANDB_ID = "wandb_id.txt"  # in the run's folder: the id of its wandb run


def to_dict(config: TrainConfig) -> dict[str, Any]:
    """The resolved config as plain values, as config.yaml has it."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))


def fingerprint(config: TrainConfig) -> str:
    """The sha256 over every key, which ranks compare."""
    return hashlib.sha256(json.dumps(to_dict(config), sort_keys=True).encode()).hexdigest()


def read(path: Path) -> TrainConfig:
    """The validated config of a run's config.yaml; its run_dir is that file's folder."""
    config = build(TrainConfig, _values(path), origin=str(path))
    return dataclasses.replace(config, run_dir=str(path.parent))


def with_dtype(config: TrainConfig) -> TrainConfig:
    """The config with model.dtype=auto decided: the dtype of the run that is continued, else the model's own.

    config.yaml then has the decided name, so that a run keeps its dtype.
    """
    if config.model.dtype != "auto":
        return config
    stored = Path(config.folder) / "config.yaml"
    before = _values(stored)["model"].get("dtype", "auto") if stored.exists() else "auto"
    if before != "auto":
        return dataclasses.replace(config, model=dataclasses.replace(config.model, dtype=before))
    model, source = dtypes.resolve(config.model)
    if model.path is not None and source != "config.json":
        console.remark(f"the model is trained in {model.dtype} ({source}); model.dtype= says otherwise (configs/model)")
    return dataclasses.replace(config, model=model)


def prepare(config: TrainConfig, *, world: Sequence[str] = (), trained: bool = False) -> Path:
    """Make or continue the run's folder: check identity, write config.yaml.

    world: lines about the nodes and ranks of this start, which become comments in config.yaml. trained: every stage of
    the run is trained (longctx.train.resume.already_trained). Only the process that holds the folder calls it: rank 0,
    or the process that starts the ranks.

    Raises UserError naming the identity keys that differ from the run already there, also those that `accept` allows
    where nothing is left to train: the record of the run would be of another one.
    """
    config = with_dtype(config)
    folder = _made(Path(config.folder))
    stored, inputs = folder / "config.yaml", inputs_of(config)
    if stored.exists():
        before, recorded = _stored(stored), _recorded(folder)
        settings = differences(before, to_dict(config), known=recorded)
        changes = [*settings, *other_files(recorded, inputs)]
        # The steps after training may read other data.
        past = [change.words for change in settings if change.key.split(".")[0] != "data"]
        if trained and past:
            raise UserError(
                f"every stage of {folder} is trained, so this would change nothing: {'; '.join(past[:6])}. Put it "
                f"back, add a stage, or take a new name=... ({stored})"
            )
        if has_step(folder):
            _refuse(folder, [change for change in changes if not accepted(change.key, config.accept)])
            inputs = {**recorded, **inputs}
        elif changes:  # another run: wandb must not add its steps to those of the first one
            (folder / WANDB_ID).unlink(missing_ok=True)
    write_text(folder / INPUTS, json.dumps(inputs, indent=1))
    comments = "".join(f"# {line}\n" for line in world)
    write_text(stored, comments + yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True))
    return folder


def stage_folder(run: Path, stage: str) -> Path:
    """The folder of a stage's model, checkpoints and results."""
    return run / "stages" / stage


def is_finished(run: Path, stage: str) -> bool:
    """Whether a stage is trained, exported and evaluated."""
    return (stage_folder(run, stage) / "finished.json").exists()


def has_step(folder: Path) -> bool:
    """Whether the run in the folder has a checkpoint or a finished stage."""
    return bool(checkpoints(folder)) or any(True for _ in folder.glob("stages/*/finished.json"))


def checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints in a run's folder, newest first; the newest that is intact is the one that is loaded."""
    folders = [path.parent for path in folder.glob("stages/*/checkpoints/step*/manifest.json")]
    return sorted(folders, key=lambda path: path.name, reverse=True)


def exported(stage: Path) -> bool:
    """Whether a stage's folder holds its model, weights included, which a user may have removed to save space."""
    model = stage / "model"
    return (model / "config.json").exists() and any(True for pattern in WEIGHTS for _ in model.glob(pattern))


def ended_stage(mark: Path, instead: str) -> dict[str, Any] | None:
    """The content of a stage's finished.json; None where it is missing, or damaged, which a line on the screen says.

    instead: what the caller does without it.
    """
    if not mark.exists():
        return None
    try:
        return read_record(mark, "the record of a finished stage", instead, keys=("heldout_loss", "seq_len"))
    except UserError as error:
        console.say(str(error))
        return None


def frozen(folder: Path) -> list[str] | None:
    """The patterns of the parameters that the run in the folder freezes; None where it has not trained yet."""
    if not has_step(folder):
        return None
    return _values(folder / "config.yaml")["optim"]["freeze"]


def check_documents(config: TrainConfig, documents: Mapping[str, str]) -> None:
    """Compare a stage's documents with those that the run has read before, and record them (rank 0).

    documents: per source, a hash of its documents and their tokens. Raises UserError where a run that has trained would
    now read other documents, and `accept` does not allow it.
    """
    folder = Path(config.folder)
    recorded = _recorded(folder)
    found = hashes_of(documents)
    if has_step(folder):
        changes = [change for change in other_files(recorded, found) if not accepted(change.key, config.accept)]
        if changes:
            names = ", ".join(change.key for change in changes)
            raise UserError(
                f"{names} gives other documents, or other tokens of them, than those that the run in {folder} was "
                "trained on, so its place in the data would point into others. Put the files back as they were, take a "
                f"new name=..., or, if the change is meant, continue with 'accept=[data]' ({folder / INPUTS})"
            )
    write_text(folder / INPUTS, json.dumps({**recorded, **found}, indent=1))


def _made(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"run_dir={folder} cannot be made: {error.strerror}; choose another run_dir=") from None
    return folder


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Lock the run's folder for this process: two runs would overwrite each other's checkpoints.

    Raises UserError that names the process that holds it. It is a file lock, so it ends with the process in any case.
    """
    with open(_made(folder) / ".lock", "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise UserError(
                f"{folder} is being written by {file.read().strip() or 'another process'}; wait for it, end it, or "
                f"take a new name=... If it has ended and a shared file system still holds its lock, delete "
                f"{folder / '.lock'}"
            ) from None
        except OSError:  # a file system without locks
            pass
        else:
            # What a killed process of this run left half-written; `longctx data` may be writing shards here.
            sweep(folder, living=False)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {node_name()}{started_by()}\n")
        file.flush()
        yield


def _values(path: Path) -> dict[str, Any]:
    """The content of a run's config.yaml. Raises UserError where the file is damaged or ends before its last key."""
    return read_record(
        path, "the settings of the run",
        "put it back from a copy (each checkpoint holds one, stages/*/checkpoints/*/config.yaml), or delete it where "
        "the run has no checkpoint", keys=(*IDENTITY, "accept"),
    )  # fmt: skip


def _stored(path: Path) -> dict[str, Any]:
    """The values of a run's config.yaml; a key that an earlier version of longctx did not have has its default."""
    values = _values(path)
    try:
        return to_dict(build(TrainConfig, values, origin=str(path)))
    except UserError:  # a key of an earlier version has gone
        return values


def _refuse(folder: Path, changes: list[IdentityChange]) -> None:
    """Raise UserError with the changes and the shortest `accept` that covers them, if there are any."""
    if not changes:
        return
    groups: dict[str, list[IdentityChange]] = {}
    for change in changes:
        groups.setdefault(change.key.split(".")[0], []).append(change)
    keys = [name if len(own) > 1 or own[0].part else own[0].key for name, own in groups.items()]
    listed = "; ".join(change.words for change in changes[:6])
    more = f" and {len(changes) - 6} more" if len(changes) > 6 else ""
    if any(change.key == "optim.freeze" for change in changes):  # the checkpoint would be refused as another model's
        way = " put optim.freeze back: the checkpoint has the weights and moments of the parameters that were trained"
    else:
        way = f", if the change is meant, continue with 'accept=[{','.join(keys)}]'"
    raise UserError(
        f"{folder} holds a run made by another config: {listed}{more}. Take a new name=..., or{way} "
        f"({folder / 'config.yaml'})"
    )


def _recorded(folder: Path) -> dict[str, dict[str, str]]:
    path = folder / INPUTS
    if not path.exists():
        return {}
    return read_record(
        path, "the hashes of the files that the run was made from",
        "put it back from a copy, or delete it: the files that the config names now then count as those of the start",
    )  # fmt: skip


def saved_words(step: int) -> str:
    """What has been saved, in words."""
    return f"saved at step {step}" if step else "nothing was trained"


def saved_in(folder: Path) -> str:
    """What the run in the folder has saved, in words, before a start of it has read its checkpoint."""
    found = checkpoints(folder)
    return saved_words(_step(found[0]) if found else 0)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step"))


def where(folder: Path) -> str:
    """The last checkpoint of a run that ends now, in words.

    latest.json is not asked: a kill may have come between a checkpoint and its pointer.
    """
    found = checkpoints(folder)
    if not found:
        return "no checkpoint was written yet"
    return f"the checkpoint of step {_step(found[0])} is saved, the same command continues the run"
