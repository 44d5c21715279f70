"""Merges adapters into a fine-tune of their base, tensor by tensor, and gives it the window that they carry.

Only rows of one tensor and its factors are in memory. Sums are computed in fp32 and cast once. config.json gets the
adapter's rope and window in both styles of keys; common merge scripts do not change them, and the merged model then
cannot use the longer window.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from longctx.config.lora import MergeConfig
from longctx.errors import UserError
from longctx.fingerprint import RECORD
from longctx.lora.adapter import Adapter
from longctx.lora.changes import ORDER, TensorChange
from longctx.lora.match import Match, MergeChoices, layout_differences, match
from longctx.lora.modules import carried_rope, check_weights, layout
from longctx.lora.tensors import Scratch, StoredTensors, row_blocks
from longctx.lora.ties import EmbeddingTables, resolve_ties
from longctx.lora.writer import output_folder
from longctx.rope.config import describe_rope, is_nested, rope_to_carry, with_rope
from longctx.storage.files import write_json
from longctx.storage.model import check_shapes
from longctx.storage.table import Entry
from longctx.storage.writer import DTYPES, SafetensorsWriter

Progress = Callable[[int, int, str], None]
_NOT_COPIED = (
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".safetensors.index.json",
    ".bin.index.json",
    ".gguf",
    ".msgpack",
    ".h5",
)


@dataclass(frozen=True)
class MergeResult:
    """The result of a merge.

    out: the merged model's folder. applied, skipped, untouched: tensors, with how or why in parentheses. rope, window:
    those of the new config.json. notes: messages for the user.
    """

    out: str
    applied: list[str]
    skipped: list[str]
    untouched: list[str]
    rope: dict[str, Any]
    window: int | None
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Output:
    """A tensor to write: the target's tensor `source`, with these changes, under `name`."""

    name: str
    source: Entry
    changes: list[TensorChange]


def merge(config: MergeConfig, progress: Progress | None = None) -> MergeResult:
    """Write the merged model `config.out`; progress(done, total, tensor) is called after each tensor.

    Raises UserError when any part of an adapter does not fit; then no files are left.
    """
    scales = _scales(config)
    with StoredTensors(config.target, what="target") as target:
        check_weights(target)
        before, tables = target.config(), resolve_ties(target)
        check_shapes(target, before)
        adapters = [Adapter(path) for path in config.adapter]
        try:
            matches = [
                match(adapter, target, tables, MergeChoices(scale, config.vocab, config.copies))
                for adapter, scale in zip(adapters, scales, strict=True)
            ]
            _refuse_misfits(config, matches, adapters, layout(before))
            own_rope, own_window = rope_to_carry(before, f"target={config.target}, config.json")
            rope, window, notes = _rope(config, adapters, own_rope, own_window)
            outputs, unties = _outputs(target, tables, matches)
            after = _config(before, rope, window, unties=unties)
            if own_window and window and window < own_window:
                notes.append(f"the target read {own_window} tokens before: the window that is written is shorter")
            notes += _notes(tables, adapters, unties=unties)
            needed = sum(output.source.nbytes for output in outputs) + 2**20
            with output_folder(config.out, needed=needed) as partial:
                _write_weights(target, outputs, partial, progress)
                _copy_others(target, partial, window if rope is not None else None, notes)
                write_json(partial / "config.json", after)
        finally:
            for adapter in adapters:
                adapter.close()
    changed = {change.tensor for found in matches for change in found.changes}
    final_rope, final_window = rope_to_carry(after, f"{config.out}/config.json")
    return MergeResult(
        out=config.out,
        applied=[f"{change.tensor} ({change.how})" for found in matches for change in found.changes],
        skipped=[item for found in matches for item in found.skipped],
        untouched=[output.name for output in outputs if output.name not in changed],
        rope=final_rope,
        window=final_window,
        notes=notes,
    )


def _scales(config: MergeConfig) -> list[float]:
    if len(config.scale) == 1:
        return config.scale * len(config.adapter)
    if len(config.scale) != len(config.adapter):
        raise UserError(
            f"scale has {len(config.scale)} values for {len(config.adapter)} adapters; give one for all or one for "
            "each (configs/lora_merge.yaml)"
        )
    return config.scale


def _refuse_misfits(
    config: MergeConfig, matches: list[Match], adapters: list[Adapter], target_layout: Mapping[str, Any]
) -> None:
    for found, adapter in zip(matches, adapters, strict=True):
        problems = found.problems
        if config.allow_partial:
            found.skipped += [f"{name}: not in the target" for name in found.unexpected]
            found.skipped += [f"{name}: adapter_config.json does not ask for it" for name in found.ignored]
            found.skipped += [f"{name}: adapter_config.json asks for it, the file lacks it" for name in found.missing]
            problems = [problem for problem in problems if problem.startswith("of another shape")]
        differing = layout_differences(adapter.extension, target_layout)
        if differing:
            problems.insert(0, f"laid out differently: {', '.join(differing)} (the adapter's base / target)")
        if problems:
            hint = "" if found.misshaped or differing else ", or allow_partial=true merges what fits"
            raise UserError(
                f"adapter={adapter.path} does not match target={config.target}; {'; '.join(problems)}. Merge into a "
                f"fine-tune of the adapter's base ({adapter.config.get('base_model_name_or_path')}){hint} (nothing "
                "was written)"
            )
        if not found.changes:
            raise UserError(f"adapter={adapter.path} changes nothing in target={config.target} (nothing was written)")


def _rope(
    config: MergeConfig, adapters: list[Adapter], own_rope: dict[str, Any], own_window: int | None
) -> tuple[dict[str, Any] | None, int | None, list[str]]:
    """The rope of the merged model (None: the target's, own_rope), its window, and notes."""
    if config.rope.rule == "keep":
        if config.like is not None or config.rope.theta is not None or config.window is not None:
            raise UserError(
                "rope=keep leaves rope and window alone; leave out rope.theta, window and like, or rope=keep"
            )
        return (
            None,
            own_window,
            [f"rope and window kept as they are in the target: {describe_rope(own_rope)}, {own_window}"],
        )
    if config.like is not None:
        with StoredTensors(config.like, what="like") as like:
            rope, window = carried_rope(like)
        return rope, window, []
    if config.rope.theta is not None or config.window is not None:
        if config.rope.theta is None or config.window is None:
            raise UserError("rope.theta and window belong together; give both (configs/lora_merge.yaml)")
        kept = {"rope_type": "default"} if is_nested(own_rope) else own_rope
        scaled = kept.get("rope_type", "default") != "default"
        notes = [f"rope.theta replaces theta alone; the target's scaling stays ({kept['rope_type']})"] if scaled else []
        return {**kept, "rope_theta": config.rope.theta}, config.window, notes
    told = [adapter.extension for adapter in adapters if adapter.extension is not None]
    extending = [item for item in told if item["extends"]]
    if not told:
        raise UserError(
            f"adapter={', '.join(config.adapter)} carries no rope and window (it was not made by longctx), so the "
            "merged model's config.json would stay as it is; say rope.theta=... window=..., or like=EXTENDED_MODEL, "
            "or rope=keep if the adapter does not extend the context (configs/lora_merge.yaml)"
        )
    if not extending:
        return None, own_window, ["the adapter does not change rope or window; the target's stay"]
    rope, window = extending[0]["rope_parameters"], extending[0]["window"]
    if any((item["rope_parameters"], item["window"]) != (rope, window) for item in extending):
        said = [f"{describe_rope(item['rope_parameters'])}, {item['window']}" for item in extending]
        if len(set(said)) == 1:  # they differ in a value that the description leaves out
            said = [f"{json.dumps(item['rope_parameters'], sort_keys=True)}, {item['window']}" for item in extending]
        raise UserError(
            f"the adapters were made for different ropes or windows: {'; '.join(sorted(set(said)))}; say which with "
            "rope.theta=... window=... or like=... (configs/lora_merge.yaml)"
        )
    if (own_rope, own_window) == (rope, window):
        raise UserError(
            f"target={config.target} has the adapter's rope and window already ({describe_rope(rope)}, {window}); "
            "merging again would add the extension twice. If only its config.json was edited, say rope=keep (nothing "
            "was written)"
        )
    return dict(rope), window, _another_rope(extending, own_rope)


def _another_rope(extending: list[dict[str, Any]], own_rope: dict[str, Any]) -> list[str]:
    """A note where the target's rope, which the adapter's replaces, is not that of the adapter's base."""
    base = extending[0].get("base_rope_parameters")
    if base is None or base == own_rope:
        return []
    return [
        f"the target's rope ({describe_rope(own_rope)}) is not that of the adapter's base ({describe_rope(base)}): it "
        "may not be a fine-tune of that base. The adapter's rope is written; rope.theta=... window=... writes another"
    ]


def _outputs(target: StoredTensors, tables: EmbeddingTables, matches: list[Match]) -> tuple[list[_Output], bool]:
    """The tensors to write, and whether config.json must not tie embedding and output layer.

    A shared weight stays shared if both of its names change in the same way.
    """
    by_tensor: dict[str, list[TensorChange]] = {}
    for change in sorted((c for found in matches for c in found.changes), key=lambda c: ORDER.index(c.how)):
        by_tensor.setdefault(change.tensor, []).append(change)
    outputs = [_Output(name, entry, by_tensor.get(name, [])) for name, entry in target.entries.items()]
    if not tables.shared:
        return outputs, tables.declared
    assert tables.embedding is not None
    assert tables.head is not None
    ours, heads = by_tensor.get(tables.embedding, []), by_tensor.get(tables.head, [])
    if [change.effect for change in ours] == [change.effect for change in heads]:
        return outputs, False
    return [*outputs, _Output(tables.head, target.entries[tables.embedding], heads)], True


def _notes(tables: EmbeddingTables, adapters: list[Adapter], *, unties: bool) -> list[str]:
    notes = [tables.note] if tables.note and not (unties and tables.shared) else []
    if unties and tables.shared:
        notes.append(
            f"{tables.head} is its own tensor now: an adapter does not change embedding and output layer alike "
            "(peft computes the same unmerged)"
        )
    exact = sum(len(adapter.deltas) for adapter in adapters)
    if exact:
        notes.append(
            f"{exact} exact differences of norms and biases are added; peft has no place for them and leaves them out"
        )
    return notes


def _config(
    before: Mapping[str, Any], rope: Mapping[str, Any] | None, window: int | None, *, unties: bool
) -> dict[str, Any]:
    after = dict(before)
    if rope is not None:
        assert window is not None
        after = with_rope(before, rope, window)
    if unties:
        after["tie_word_embeddings"] = False
        if isinstance(after.get("text_config"), Mapping):
            after["text_config"] = {**after["text_config"], "tie_word_embeddings": False}
    return after


def _write_weights(target: StoredTensors, outputs: list[_Output], partial: Path, progress: Progress | None) -> None:
    scratch, done, total_size = Scratch(), 0, 0
    for file in target.files:
        mine = [output for output in outputs if output.source.file == file]
        if not mine:
            continue
        writer = SafetensorsWriter(partial / file, [output.name for output in mine])
        for output in mine:
            writer.begin(output.name, output.source.dtype, output.source.shape)
            if output.changes:
                _write_changed(target, output, writer, scratch)
            else:
                _write_copied(target, output, writer, scratch)
            done += 1
            if progress is not None:
                progress(done, len(outputs), output.name)
        writer.close()
        total_size += writer.written
    if len(target.files) > 1:
        index = {
            "metadata": {"total_size": total_size},
            "weight_map": {output.name: output.source.file for output in outputs},
        }
        write_json(partial / "model.safetensors.index.json", index)


def _write_changed(target: StoredTensors, output: _Output, writer: SafetensorsWriter, scratch: Scratch) -> None:
    entry, apply = output.source, [change.load() for change in output.changes]
    dtype = DTYPES[entry.dtype]
    wide_type = torch.float64 if dtype is torch.float64 else torch.float32
    for start, stop in row_blocks(entry):
        size = (stop - start) * entry.row_bytes
        rows = target.read(entry.name, start, stop, out=scratch.bytes("raw", size))
        wide = scratch.floats("wide", tuple(rows.shape), wide_type).copy_(rows)
        for change in apply:
            change(wide, start)
        rows.copy_(wide)
        if not bool(torch.isfinite(rows).all()):
            raise UserError(
                f"{output.name} is not finite after merging (in the target, the adapter, or beyond what {entry.dtype} "
                "holds); nothing was written"
            )
        writer.write(rows)


def _write_copied(target: StoredTensors, output: _Output, writer: SafetensorsWriter, scratch: Scratch) -> None:
    step = 16 * 2**20
    for offset in range(0, output.source.nbytes, step):
        size = min(step, output.source.nbytes - offset)
        writer.write(target.raw(output.source.name, out=scratch.bytes("raw", size), offset=offset, size=size))


def _copy_others(target: StoredTensors, partial: Path, window: int | None, notes: list[str]) -> None:
    """Copy tokenizer, generation config, templates and other files, and raise the tokenizer's length to the window."""
    for name in target.source.names():
        if name.endswith(_NOT_COPIED) or name in ("config.json", ".gitattributes", "hashes.json", RECORD):
            continue  # the last two describe the target's own weights
        (partial / name).write_bytes(target.source.fetch(name).read_bytes())
    if window is not None and (partial / "tokenizer_config.json").exists():
        settings = target.config("tokenizer_config.json")
        if (settings.get("model_max_length") or window) < window:
            settings["model_max_length"] = window
            write_json(partial / "tokenizer_config.json", settings)
            notes.append(f"tokenizer_config.json: model_max_length is {window} now")
