"""Which tensor of a target each part of an adapter changes, and how; and what does not fit, all of it listed.

A pair, an exact difference or a saved module is used exactly once: `match` returns the changes together
with what is missing, unexpected, mis-shaped or skipped, and decides nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from longctx.lora.adapter import Adapter
from longctx.lora.modules import Kind, Module, classify
from longctx.lora.tensors import Checkpoint
from longctx.storage.table import Entry

HEAD = "lm_head.weight"


@dataclass(frozen=True)
class Change:
    """What one part of an adapter does to the first `rows` rows of `tensor`.

    how: `factors` (w + scale * alpha/r * B A), `exact` (w + scale * difference), `replaced` (w + scale *
    (new - w)).
    """

    tensor: str
    how: str
    adapter: Adapter
    key: str
    scale: float
    rows: int

    def load(self) -> Callable[[Tensor, int], None]:
        """A function that changes, in place, the fp32 rows it is given; the second argument is the first
        row's number.
        """
        if self.how == "factors":
            pair = self.adapter.pairs[self.key]
            left, right = self.adapter.factors(pair)

            def add_factors(block: Tensor, start: int) -> None:
                rows = left[start : min(start + block.shape[0], self.rows)].to(block.dtype)
                if rows.shape[0]:
                    block[: rows.shape[0]].addmm_(rows, right.to(block.dtype), alpha=self.scale * pair.scale)

            return add_factors
        if self.how == "exact":
            difference = self.adapter.delta(self.key)

            def add_difference(block: Tensor, start: int) -> None:
                block.add_(difference[start : start + block.shape[0]].to(block.dtype), alpha=self.scale)

            return add_difference

        def move(block: Tensor, start: int) -> None:
            stop = min(start + block.shape[0], self.rows)
            if stop > start:
                new = self.adapter.replacement(self.key, start, stop).to(block.dtype)
                block[: stop - start].lerp_(new, self.scale)

        return move


@dataclass
class Match:
    """Changes by tensor; unties: the adapter changes a tied model's output layer alone, so it needs its own
    tensor.
    """

    changes: list[Change] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    misshaped: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    unties: bool = False

    @property
    def problems(self) -> list[str]:
        titles = (
            ("missing", self.missing),
            ("unexpected", self.unexpected),
            ("of another shape", self.misshaped),
        )
        return [f"{title}: {', '.join(names)}" for title, names in titles if names]


def match(adapter: Adapter, target: Checkpoint, *, tied: bool, scale: float, vocab: str) -> Match:
    """Hold the adapter's parts against the target's tensors. vocab: `skip` or `common`, for rows that
    differ.
    """
    found = Match()
    parts: list[tuple[str, str, str, tuple[int, ...]]] = []
    parts += [(f"{name}.weight", name, "factors", pair.shape) for name, pair in adapter.pairs.items()]
    if adapter.side is not None:
        parts += [(name, name, "exact", entry.shape) for name, entry in adapter.side.entries.items()]
    for name, stored in adapter.replacements.items():
        parts.append((name, name, "replaced", adapter.weights.entries[stored].shape))
    for tensor, key, how, shape in parts:
        entry = target.entries.get(tensor)
        if entry is None and tied and tensor == HEAD:
            entry = next((e for e in target.entries.values() if classify(e) is Kind.EMBEDDING), None)
            found.unties = entry is not None
        if entry is None:
            found.unexpected.append(tensor)
        elif entry.shape == shape:
            found.changes.append(Change(tensor, how, adapter, key, scale, entry.rows))
        elif not _only_vocabulary_differs(entry, shape):
            found.misshaped.append(f"{tensor} {list(shape)} for {list(entry.shape)}")
        else:
            rows = min(entry.rows, shape[0])
            sizes = f"the adapter has {shape[0]} rows, the target {entry.rows}"
            if vocab == "common":
                found.changes.append(Change(tensor, how, adapter, key, scale, rows))
            left_out = f"rows {rows} and up" if vocab == "common" else "all; vocab=common merges the common rows"
            found.skipped.append(f"{tensor}: {left_out} ({sizes})")
    found.skipped += [f"{name}: a copy of the base's own weights; the target keeps its own" for name in adapter.copies]
    found.missing = [] if adapter.partial else _missing(adapter, target)
    return found


def _only_vocabulary_differs(entry: Entry, shape: tuple[int, ...]) -> bool:
    return classify(entry) in (Kind.EMBEDDING, Kind.HEAD) and entry.shape[1:] == shape[1:]


def _missing(adapter: Adapter, target: Checkpoint) -> list[str]:
    """Matrices of the target that the adapter's target_modules name and its file does not hold."""
    candidates = [Module(entry, classify(entry)) for entry in target.entries.values()]
    matrices = [module for module in candidates if module.kind in (Kind.LINEAR, Kind.HEAD, Kind.EMBEDDING)]
    saved = set(adapter.replacements)
    return [
        module.name
        for module in matrices
        if adapter.covers(module.name) and module.name not in adapter.pairs and module.entry.name not in saved
    ]


def layout_differences(extension: Mapping[str, Any] | None, target: Mapping[str, Any]) -> list[str]:
    """Where the adapter's base and the target lay out their heads differently though shapes agree."""
    known = (extension or {}).get("layout") or {}
    keys = ("model_type", "num_attention_heads", "num_key_value_heads", "head_dim")
    return [f"{key} {known[key]} / {target.get(key)}" for key in keys if key in known and known[key] != target.get(key)]
