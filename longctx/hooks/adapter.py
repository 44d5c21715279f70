"""The adapter of a run, and the sibling it is merged into.

Each folder holds a record of what it was made from; another model or another setting makes it anew.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from longctx import console
from longctx.config.lora import ExtractConfig, MergeConfig
from longctx.config.train import TrainConfig
from longctx.durable import discard, write_text
from longctx.identity import RECORD, identity, key_of


def extract_adapter(config: TrainConfig, tuned: Path, out: Path) -> None:
    """Write tuned - base as a LoRA to `out`, unless it holds just that."""
    hook, base = config.hooks.lora, str(config.model.path)
    settings = ExtractConfig(
        base=base, tuned=str(tuned), out=str(out), rank=hook.rank, profile=hook.profile,
        embeddings=hook.embeddings, dtype="float32" if config.model.dtype == "float32" else "bfloat16",
    )  # fmt: skip
    paths = ("base", "tuned", "out")
    chosen = {name: value for name, value in asdict(settings).items() if name not in paths}
    key = key_of({"base": identity(base), "tuned": identity(tuned), **chosen})
    if _stands(out, key):
        return
    from longctx.lora.extract import extract

    extract(settings)
    _record(out, key)


def merge_sibling(sibling: Path, adapter: Path, out: Path) -> None:
    """Write sibling + adapter to `out`, unless it holds just that; theta and window come from the adapter."""
    key = key_of({"sibling": identity(sibling), "adapter": identity(adapter)})
    if _stands(out, key):
        return
    from longctx.lora.merge import merge

    merge(MergeConfig(target=str(sibling), adapter=[str(adapter)], out=str(out)))
    _record(out, key)


def _stands(out: Path, key: str) -> bool:
    """Whether `out` was made from what `key` names; what was made from something else is removed."""
    if not out.exists():
        return False
    record = out / RECORD
    if record.exists() and json.loads(record.read_text())["key"] == key:
        return True
    console.say(f"{out} was made from another model or with other settings; making it again")
    discard(out)
    return False


def _record(out: Path, key: str) -> None:
    write_text(out / RECORD, json.dumps({"key": key}))
