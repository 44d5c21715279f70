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
from typing import TYPE_CHECKING, Any

import yaml

from longctx import console
from longctx import dtype as dtypes
from longctx.config.base import build
from longctx.config.train import IDENTITY, TrainConfig
from longctx.distributed.launcher import node_name, started_by
from longctx.errors import UserError
from longctx.fingerprint import MODEL, TOKENIZER, WEIGHTS, content_hashes
from longctx.signals import sweep
from longctx.storage.files import read_record, write_text

if TYPE_CHECKING:
    from longctx.distributed.ranks import Ranks

INPUTS = "inputs.json"  # in the run's folder: per key that names files, their hashes
WANDB_ID = "wandb_id.txt"  # in the run's folder: the id of its wandb run
# Parts of identity groups that change how fast, not what: they may differ.
FREE_INSIDE = ("model.memory", "model.attention", "model.attention_kernel")


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
    the run is trained (longctx.train.place.check_folder). Only the process that holds the folder calls it: rank 0, or
    the process that starts the ranks.

    Raises UserError naming the identity keys that differ from the run already there, also those that `accept` allows
    where nothing is left to train: the record of the run would be of another one.
    """
    config = with_dtype(config)
    folder = _made(Path(config.folder))
    stored, inputs = folder / "config.yaml", inputs_of(config)
    if stored.exists():
        before, recorded = _stored(stored), _recorded(folder)
        settings = differences(before, to_dict(config), known=recorded)
        changes = [*settings, *_other_files(recorded, inputs)]
        past = [
            change.words for change in settings if change.key.split(".")[0] != "data"
        ]  # what follows may read other
        if trained and past:
            raise UserError(
                f"every stage of {folder} is trained, so this would change nothing: {'; '.join(past[:6])}. Put it "
                f"back, add a stage, or take a new name=... ({stored})"
            )
        if has_step(folder):
            _refuse(folder, [change for change in changes if not _accepted(change.key, config.accept)])
            inputs = {**recorded, **inputs}
        elif changes:  # another run: wandb must not add its steps to those of the first one
            (folder / WANDB_ID).unlink(missing_ok=True)
    write_text(folder / INPUTS, json.dumps(inputs, indent=1))
    comments = "".join(f"# {line}\n" for line in world)
    write_text(stored, comments + yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True))
    return folder


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
        changes = [change for change in _other_files(recorded, found) if not _accepted(change.key, config.accept)]
        if changes:
            names = ", ".join(change.key for change in changes)
            raise UserError(
                f"{names} gives other documents, or other tokens of them, than those that the run in {folder} was "
                "trained on, so its place in the data would point into others. Put the files back as they were, take a "
                f"new name=..., or, if the change is meant, continue with 'accept=[data]' ({folder / INPUTS})"
            )
    write_text(folder / INPUTS, json.dumps({**recorded, **found}, indent=1))


def hashes_of(documents: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """A stage's hash of each source's documents, as inputs.json has them."""
    return {f"data.sources.{name}": {"": key} for name, key in documents.items()}


def check_nodes(ranks: Ranks, files: Mapping[str, Mapping[str, str]] | None) -> None:
    """Raise UserError where a node reads other files than the first one, of which its ranks would train. A collective.

    files: on the first rank of each node, the hashes of the files by the key that names them; None on the others. A
    model or documents may be copied to each node's own disk, and each node has its own cache of the hub.
    """
    found = ranks.gather(files)
    for rank, others in enumerate(found):
        for change in _other_files(found[0], others) if others else ():
            here, there = found[0].get(change.key, {}), others[change.key]
            names = [name for name in {**here, **there} if name and there.get(name) != here.get(name)]
            shown = f" ({', '.join(names[:3])})" if names else ""
            node = f" on {ranks.places[rank].node}" if ranks.places else ""
            if _named_on_hub(there):
                shown, remedy = (
                    f" ({there['']}, {here['']})",
                    "let all nodes read one revision, from a cache they share",
                )
            else:
                remedy = "copy the files there again, or name a folder that all nodes share"
            raise UserError(
                f"rank {rank}{node} has other files than rank 0 under {change.key}{shown}, so the ranks would train "
                f"different models or on different documents; {remedy}"
            )


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


@dataclasses.dataclass(frozen=True)
class IdentityChange:
    """An identity key that differs, with a message; part: a whole section was added or removed."""

    key: str
    words: str
    part: bool = False


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


def differences(before: Mapping[str, Any], now: Mapping[str, Any], *, known: Mapping[str, Any]) -> list[IdentityChange]:
    """Every identity key that differs; a missing key counts as null, a missing section as one change.

    known: the keys whose files are compared by content, so that their paths may differ.
    """
    return [change for key in IDENTITY for change in _compare(key, before.get(key), now.get(key), known)]


def _compare(key: str, old: Any, new: Any, known: Mapping[str, Any]) -> Iterator[IdentityChange]:
    if key in FREE_INSIDE or _names_known_files(key, known) or old == new:
        return
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for inner in dict.fromkeys([*new, *old]):
            yield from _compare(f"{key}.{inner}", old.get(inner), new.get(inner), known)
    elif old is None and isinstance(new, Mapping):
        yield IdentityChange(key, f"{key} is new", part=True)
    elif isinstance(old, Mapping) and new is None:
        yield IdentityChange(key, f"{key} is gone", part=True)
    else:
        yield IdentityChange(key, f"{key} was {old!r}, now {new!r}")


def _names_known_files(key: str, known: Mapping[str, Any]) -> bool:
    """Whether a key is a path whose files have a hash in the run's folder."""
    if key == "data.path":  # read by the sources that name it
        return any(name.startswith("data.sources.") for name in known)
    return key in known or (key.endswith(".path") and key.removesuffix(".path") in known)


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
    raise UserError(
        f"{folder} holds a run made by another config: {listed}{more}. Take a new name=..., or, if "
        f"the change is meant, continue with 'accept=[{','.join(keys)}]' ({folder / 'config.yaml'})"
    )


def inputs_of(config: TrainConfig) -> dict[str, dict[str, str]]:
    """Hashes of the files that identity keys name; those of documents are added when a stage opens them."""
    model = config.model.path
    return {
        "model.path": content_hashes(model, MODEL),
        "model.tokenizer": content_hashes(config.model.tokenizer or model, TOKENIZER),
        "curriculum.theta_file": content_hashes(config.curriculum.theta_file),
    }


def _recorded(folder: Path) -> dict[str, dict[str, str]]:
    path = folder / INPUTS
    if not path.exists():
        return {}
    return read_record(
        path, "the hashes of the files that the run was made from",
        "put it back from a copy, or delete it: the files that the config names now then count as those of the start",
    )  # fmt: skip


def _other_files(
    before: Mapping[str, Mapping[str, str]], now: Mapping[str, Mapping[str, str]]
) -> Iterator[IdentityChange]:
    """A change for each key whose files, or whose revision on the hub, differ from the recorded ones."""
    for key, files in now.items():
        old = before.get(key, files)
        if _named_on_hub(old) == _named_on_hub(files) != "":  # the hash of one may not be known
            if "@" in old[""] and "@" in files[""] and old != files:
                yield IdentityChange(key, f"{key} is {files['']} on the hub now, and was {old['']} at the start")
            continue
        names = [name for name in dict.fromkeys([*files, *old]) if old.get(name) != files.get(name)]
        if names:
            shown = ", ".join(name for name in names[:3] if name)
            yield IdentityChange(key, f"{key} holds other files than at the start" + (f" ({shown})" if shown else ""))


def _named_on_hub(hashes: Mapping[str, str]) -> str:
    """The hub id that stands where a folder has hashes, without the hash of its files; "" for files."""
    name = hashes.get("", "") if len(hashes) == 1 else ""
    return name.split("@")[0] if "/" in name or "@" in name else ""


def where(folder: Path) -> str:
    """The last checkpoint of a run that ends now, in words.

    latest.json is not asked: a kill may have come between a checkpoint and its pointer.
    """
    found = checkpoints(folder)
    if not found:
        return "no checkpoint was written yet"
    step = int(found[0].name.removeprefix("step"))
    return f"the checkpoint of step {step} is saved, the same command continues the run"


def _accepted(key: str, accept: list[str]) -> bool:
    return any(key == item or key.startswith(item + ".") for item in accept)
