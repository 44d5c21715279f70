"""The adapter of a run, and the sibling into which it is merged.

Each folder has the fingerprint of its inputs; it is made again where the models or the settings have changed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from longctx import console
from longctx.config.lora import ExtractConfig, MergeConfig
from longctx.config.train import TrainConfig
from longctx.errors import UserError
from longctx.fingerprint import RECORD, WEIGHTS, content_hashes, fingerprint_of, folder_fingerprint
from longctx.lora.sizes import megabytes
from longctx.shape import config_json, model_type_of, tied_of
from longctx.signals import remove
from longctx.storage.files import read_record, write_text
from longctx.storage.model_files import read_header


def left_out(config: TrainConfig) -> list[str]:
    """Patterns of the parameters that `extract_adapter` leaves behind, as lora extract decides from profile and tying.

    Empty where the run makes no adapter: it is switched off, or the model was drawn at random and has no base.
    """
    asked = config.after_training.lora
    if not asked.enabled or config.model.path is None:
        return []
    model, full = config_json(config.model.path)[0], asked.profile == "full"
    tied = tied_of(model)
    embeddings = (tied and full) if asked.embeddings is None else asked.embeddings
    patterns = [] if embeddings else ["*embed_tokens*"]
    if not full:
        biased = model_type_of(model) == "qwen2" or any(model.get(f"{part}_bias") for part in ("attention", "mlp"))
        patterns += ["*norm*"] + ["*lm_head*"] * (not tied) + ["*.bias"] * biased
    return patterns


def extract_adapter(config: TrainConfig, tuned: Path, out: Path) -> None:
    """Write tuned - base as a LoRA to `out` unless it is up to date, and say how much of the change it carries."""
    asked, base = config.after_training.lora, str(config.model.path)
    if Path(base).is_dir():
        base = str(Path(base).resolve())  # peft resolves it against the folder of the process that loads the adapter
    settings = ExtractConfig(
        base=base, tuned=str(tuned), out=str(out), rank=asked.rank, profile=asked.profile,
        embeddings=asked.embeddings, dtype="bfloat16" if config.model.dtype == "bfloat16" else "float32",
        base_dtype=config.model.dtype,  # type: ignore[arg-type]
    )  # fmt: skip
    paths = ("base", "tuned", "out")
    chosen = {name: value for name, value in asdict(settings).items() if name not in paths}
    key = fingerprint_of({"base": folder_fingerprint(base), "tuned": folder_fingerprint(tuned), **chosen})
    if _up_to_date(out, key):
        return
    from longctx.lora.extract import extract

    with _replaced(out):
        made = extract(settings)
        _record(out, key)
    names = [row.tensor for row in made.not_carried]
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    console.say(
        f"the adapter {out}: rank {made.rank}, {megabytes(made.bytes)}, {made.share['everything']:.1%} of the squared "
        "norm of what training changed" + (f"; not carried: {', '.join(names[:3])}{more}" if names else "")
    )


def merge_sibling(sibling: Path, adapter: Path, out: Path) -> None:
    """Write sibling + adapter to `out` unless it is up to date; theta and window come from the adapter."""
    folders = {"sibling": folder_fingerprint(sibling), "adapter": folder_fingerprint(adapter)}
    key = fingerprint_of({**folders, "vocab": "common"})
    if _up_to_date(out, key):
        return
    from longctx.lora.merge import merge

    with _replaced(out):
        made = merge(MergeConfig(target=str(sibling), adapter=[str(adapter)], out=str(out), vocab="common"))
        _record(out, key)
    console.say(f"the sibling with the adapter merged in, a window of {made.window:,} tokens: {out}")
    for note in made.notes:
        console.remark(note)
    for tensor in made.skipped:
        console.warn(f"the merged sibling lacks a part of the adapter: {tensor}")


def _up_to_date(out: Path, key: str) -> bool:
    """Whether the folder `out` is whole and has the fingerprint `key`; otherwise a line says why it is made again."""
    if not out.exists():
        return False
    try:
        if _read_whole(out).get("key") == key:
            return True
        why = "was made from another model or with other settings"
    except UserError as error:
        why = f"is not whole ({str(error).rpartition('; ')[0]})"
    console.say(f"{out} {why}; making it again")
    return False


@contextmanager
def _replaced(out: Path) -> Iterator[None]:
    """Move the folder `out` aside while another is made in its place, and back where that fails."""
    before = out.with_name(f".{out.name}.before")
    if out.exists():
        remove(before)
        out.rename(before)
    try:
        yield
    except BaseException:
        if before.exists():
            remove(out)
            before.rename(out)
        raise
    remove(before)


def _read_whole(out: Path) -> dict[str, Any]:
    """The record of what the folder `out` was made from. Raises UserError for a file that is missing or cut short."""
    for name in ("config.json", "adapter_config.json", "longctx.json"):
        if (out / name).exists():  # a merged folder also has files of the sibling's own
            read_record(out / name, "a file that longctx wrote", "make it again")
    made = read_record(out / RECORD, "the record of what the folder was made from", "make it again")
    for name in made.get("weights", ()):
        if name.endswith(".safetensors"):
            read_header(out / name, str(out))
    return made


def _record(out: Path, key: str) -> None:
    write_text(out / RECORD, json.dumps({"key": key, "weights": content_hashes(out, WEIGHTS)}))
