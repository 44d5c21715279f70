"""The identity of a run: what its settings and its files must share with those of an earlier start, and of all nodes.

The identity keys (model, data, curriculum, optim, seed) must not change during a run; all others may. Where such a key
is a path or a hub id, the content of its files decides.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from longctx.config.train import IDENTITY, TrainConfig
from longctx.errors import UserError
from longctx.fingerprint import MODEL, TOKENIZER, content_hashes

if TYPE_CHECKING:
    from longctx.distributed.ranks import Ranks

# Keys in identity sections that change speed only.
FREE_INSIDE = ("model.memory", "model.attention", "model.attention_kernel")


@dataclass(frozen=True)
class IdentityChange:
    """An identity key that differs, with a message; part: a whole section was added or removed."""

    key: str
    words: str
    part: bool = False


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


def accepted(key: str, accept: list[str]) -> bool:
    return any(key == item or key.startswith(item + ".") for item in accept)


def inputs_of(config: TrainConfig) -> dict[str, dict[str, str]]:
    """Hashes of the files that identity keys name; those of documents are added when a stage opens them."""
    model = config.model.path
    return {
        "model.path": content_hashes(model, MODEL),
        "model.tokenizer": content_hashes(config.model.tokenizer or model, TOKENIZER),
        "curriculum.theta_file": content_hashes(config.curriculum.theta_file),
    }


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
        for change in other_files(found[0], others) if others else ():
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


def other_files(
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
