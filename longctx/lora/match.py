"""Finds the tensor of a target that each part of an adapter changes, as PEFT does, and lists all parts that do not fit.

PEFT takes the modules from adapter_config.json and then loads the tensors that the file holds under their names. It
leaves missing tensors at their initial values and ignores surplus ones. Both are listed here, and the caller refuses
them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from longctx.errors import UserError
from longctx.lora.adapter import Adapter, FactorPair
from longctx.lora.changes import ORDER, TensorChange
from longctx.lora.modules import WeightKind, classify
from longctx.lora.tensors import Entry, StoredTensors, row_blocks
from longctx.lora.ties import EmbeddingTables
from longctx.storage.writer import DTYPES

_MATRICES = (WeightKind.LINEAR, WeightKind.HEAD, WeightKind.EMBEDDING)


@dataclass(frozen=True)
class MergeChoices:
    """The user's choices: scale; vocab (`skip` or merge the `common` rows); copies (`own`, `adapter` or not given)."""

    scale: float = 1.0
    vocab: str = "skip"
    copies: str | None = None


def _first(names: list[str]) -> str:
    """The first names and the number of the others, because an adapter of another base misses hundreds."""
    more = len(names) - 6
    return ", ".join(names[:6]) + (f" and {more} more" if more > 0 else "")


@dataclass
class Match:
    """The changes in the order in which they apply, and the parts that do not fit, sorted by what is wrong."""

    changes: list[TensorChange] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)
    misshaped: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)

    @property
    def problems(self) -> list[str]:
        titles = (
            ("missing", self.missing),
            ("unexpected", self.unexpected),
            ("not asked for by adapter_config.json, so peft ignores them", self.ignored),
            ("of another shape", self.misshaped),
        )
        return [f"{title}: {_first(names)}" for title, names in titles if names]


def match(adapter: Adapter, target: StoredTensors, tables: EmbeddingTables, choices: MergeChoices) -> Match:
    """Match the adapter's parts with the target's tensors.

    Raises UserError when the user must make a choice first, and when parts contradict each other.
    """
    matcher = _Matcher(adapter, target, tables, choices)
    matcher.compare_with_config()
    matcher.stored_tensors()
    matcher.inner_tensors()
    matcher.single_rows()
    matcher.factors()
    matcher.exact_differences()
    matcher.found.changes.sort(key=lambda change: ORDER.index(change.how))
    return matcher.found


class _Matcher:
    """Matches one adapter with one target and collects the result in `found`."""

    def __init__(self, adapter: Adapter, target: StoredTensors, tables: EmbeddingTables, choices: MergeChoices) -> None:
        self.adapter, self.target, self.tables, self.choices = adapter, target, tables, choices
        self.settings, self.found = adapter.settings, Match()
        # compare_with_config removes the pairs that peft ignores.
        self.pairs = dict(adapter.pairs)
        self.ties_factors = tables.declared and self.settings.ties_factors
        self.ties_saved = tables.declared and self.settings.ties_saved
        self.names = list(target.entries)
        if tables.shared and tables.head is not None:
            self.names.append(tables.head)

    def entry(self, tensor: str) -> Entry | None:
        """The target's tensor of this name; an output layer that shares the embedding's weight has the embedding's."""
        if self.tables.shared and tensor == self.tables.head:
            tensor = str(self.tables.embedding)
        return self.target.entries.get(tensor)

    def compare_with_config(self) -> None:
        """List modules that the config names and the file lacks, and modules that only the file has."""
        self._refuse_older_ours()
        for tensor in self.names:
            entry = self.entry(tensor)
            assert entry is not None
            kind = WeightKind.HEAD if tensor == self.tables.head else classify(entry)
            module, tied = tensor.removesuffix(".weight"), self.ties_factors and tensor in self.tables.both
            if kind in _MATRICES and tensor.endswith(".weight"):
                wanted = self.settings.targets(module, linear=kind is WeightKind.LINEAR)
                wanted = tensor == self.tables.embedding if tied else wanted
                if wanted and module not in self.adapter.pairs:
                    self.found.missing.append(module)
                if not wanted and module in self.adapter.pairs and not tied:
                    self.found.ignored.append(module)
                    del self.pairs[module]
                if self.settings.token_rows(module, _module(self.tables.embedding)) and self._lacks_rows(tensor):
                    self.found.missing.append(f"{module}.token_adapter")
            optional = self.ties_saved and tensor == self.tables.head
            if self._saved(tensor) and tensor not in self.adapter.whole and not optional:
                self.found.missing.append(tensor)

    def stored_tensors(self) -> None:
        """Match stored tensors: modules_to_save get a weight of their own, others are loaded into the model's."""
        for tensor, stored in self.adapter.whole.items():
            saved, shape = self._saved(tensor), self.adapter.weights.entries[stored].shape
            if not saved and self._wrapped(_module(tensor)):
                self.found.ignored.append(tensor)
                continue
            names = self._spread(tensor, both=self.ties_saved) if saved else self._storage(tensor)
            other = self.adapter.whole.get(str(self.tables.embedding))
            if tensor == self.tables.head and self.tables.embedding in names and other is not None:
                if not _equal(self.adapter.weights, other, self.adapter.weights, stored):
                    raise self._contradiction(
                        f"{tensor} and {self.tables.embedding} are one weight and the file has two"
                    )
                continue
            for name in names:
                self.put(name, "replaced", stored, shape)

    def inner_tensors(self) -> None:
        """Match tensors that are loaded into a wrapped layer: trained biases, and copies of the base's weights."""
        for tensor, stored in self.adapter.inner.items():
            if not self._saved(tensor) and not self._wrapped(_module(tensor)):
                self.found.ignored.append(f"{_module(tensor)}.base_layer.{tensor.rsplit('.', 1)[1]}")
                continue
            names = self._storage(tensor)
            if tensor.endswith(".weight") and names and not self._use_copy(tensor, stored):
                continue
            for name in names:
                self.put(name, "replaced", stored, self.adapter.weights.entries[stored].shape)

    def single_rows(self) -> None:
        """Match the rows of trainable_token_indices; in a tied model PEFT replaces the rows of both layers."""
        embedding = _module(self.tables.embedding)
        for module, stored in self.adapter.rows.items():
            tensor, shape = f"{module}.weight", self.adapter.weights.entries[stored].shape
            indices = self.settings.token_rows(module, embedding)
            tied = tensor == self.tables.head and self.tables.declared and embedding in self.adapter.rows
            twice = tied and indices in (None, self.settings.token_rows(str(embedding), embedding))
            if twice and _equal(self.adapter.weights, stored, self.adapter.weights, self.adapter.rows[str(embedding)]):
                continue
            if indices is None or twice:
                self.found.ignored.append(f"{module}.token_adapter")
                continue
            entry = self.entry(tensor)
            self._check_rows(tensor, indices, shape, entry)
            of_head = self.settings.token_rows(str(_module(self.tables.head)), embedding)
            alone = of_head is not None and of_head != indices
            both = self.tables.declared and tensor == self.tables.embedding and not alone
            for name in self._spread(tensor, both=both):
                if name == self.tables.head and f"{_module(name)}.bias" in self.target.entries:
                    raise self._contradiction("peft leaves out the bias of an output layer with trained rows")
                self.put(name, "rows", stored, entry and entry.shape, indices=tuple(indices))

    def factors(self) -> None:
        embedding = self.pairs.get(str(_module(self.tables.embedding)))
        for module, pair in self.pairs.items():
            tensor, used = f"{module}.weight", pair
            if tensor == self.tables.head and embedding is not None:
                twins = self._twins(embedding, pair)
                if self.ties_factors:
                    if not twins:
                        raise self._contradiction(f"{module} and {embedding.module} are tied and differ")
                    continue
                # The same change under two names keeps a tied model tied.
                used = replace(embedding, module=module, scale=pair.scale) if twins else pair
            for name in self._spread(tensor, both=self.ties_factors and tensor in self.tables.both):
                own = used
                if self.ties_factors and name == self.tables.head:
                    # A tied output layer has the embedding's factors and a scale of its own.
                    own = replace(
                        used, module=name.removesuffix(".weight"), scale=self.settings.scale(str(_module(name)))
                    )
                self.put(name, "factors", own, own.shape)
        for module, stored in self.adapter.biases.items():
            self._factor_bias(module, stored)
        if self.adapter.config.get("lora_bias"):
            self.found.missing += [f"{m}.lora_B.bias" for m in self.pairs if m not in self.adapter.biases]

    def exact_differences(self) -> None:
        if self.adapter.norm_deltas is not None:
            for name, entry in self.adapter.norm_deltas.entries.items():
                self.put(name, "exact", name, entry.shape)

    def put(self, tensor: str, how: str, source: FactorPair | str, shape: Any, **more: Any) -> None:
        entry = self.entry(tensor)
        if entry is None:
            self.found.unexpected.append(tensor)
        elif entry.shape == shape:
            change = TensorChange(tensor, how, self.adapter, source, self.choices.scale, entry.rows, **more)
            self.found.changes.append(change)
        elif not _only_vocabulary_differs(entry, shape):
            self.found.misshaped.append(f"{tensor} {list(shape)} for {list(entry.shape)}")
        else:
            common, rows = self.choices.vocab == "common", min(entry.rows, shape[0])
            if common:
                self.found.changes.append(
                    TensorChange(tensor, how, self.adapter, source, self.choices.scale, rows, **more)
                )
            left_out = f"rows {rows} and up" if common else "all; vocab=common merges the common rows"
            sizes = f"the adapter has {shape[0]} rows, the target {entry.rows}"
            self.found.skipped.append(f"{tensor}: {left_out} ({sizes})")

    def _spread(self, tensor: str, *, both: bool) -> tuple[str, ...]:
        """The tensors that a part of `tensor` changes; `both` of a tied pair if the part applies to both."""
        if both and tensor in self.tables.both:
            return self.tables.both
        return (tensor,)

    def _saved(self, tensor: str) -> bool:
        return self.settings.saves(tensor) or (self.ties_saved and tensor in self.tables.both)

    def _storage(self, tensor: str) -> tuple[str, ...]:
        """The tensors for which the model uses its own weight of this name."""
        names = self.tables.both if self.tables.shared and tensor in self.tables.both else (tensor,)
        return tuple(name for name in names if not self._saved(name))

    def _wrapped(self, module: str | None) -> bool:
        tied = self.tables.declared and module == _module(self.tables.head)
        rows = {module, _module(self.tables.embedding)} if tied else {module}
        return module in self.pairs or bool(rows & self.adapter.rows.keys())

    def _lacks_rows(self, tensor: str) -> bool:
        embedding = _module(self.tables.embedding)
        tied = self.tables.declared and tensor == self.tables.head and embedding in self.adapter.rows
        return _module(tensor) not in self.adapter.rows and not tied

    def _use_copy(self, tensor: str, stored: str) -> bool:
        """Whether the adapter's copy of the base's weight replaces the target's weight, as it does in peft."""
        entry = self.entry(tensor)
        if entry is None or _equal(self.target, entry.name, self.adapter.weights, stored):
            return entry is None
        if self.choices.copies is None:
            raise UserError(
                f"adapter={self.adapter.path} holds a copy of its base's {tensor} beside what it adds to it, peft puts "
                f"that copy into the model, and target={self.target.path} has other numbers there; say copies=own to "
                "keep the target's, as for another fine-tune of the same base, or copies=adapter to do as peft does "
                "(configs/lora_merge.yaml; nothing was written)"
            )
        if self.choices.copies == "own":
            self.found.skipped.append(f"{tensor}: a copy of the base's own weights; the target keeps its own")
        return self.choices.copies == "adapter"

    def _twins(self, embedding: FactorPair, head: FactorPair) -> bool:
        read = self.adapter.weights.read
        if not embedding.embedding or head.embedding or embedding.rank != head.rank or embedding.shape != head.shape:
            return False
        return torch.equal(read(embedding.a), read(head.b).T) and torch.equal(read(embedding.b), read(head.a).T)

    def _factor_bias(self, module: str, stored: str) -> None:
        pair = self.pairs.get(module)
        if pair is None or not self.adapter.config.get("lora_bias"):
            self.found.ignored.append(f"{module}.lora_B.bias")
        elif f"{module}.bias" not in self.target.entries:
            self.found.unexpected.append(f"{module}.lora_B.bias (the target's module has no bias to add it to)")
        else:
            shape = self.adapter.weights.entries[stored].shape
            self.put(f"{module}.bias", "bias", stored, shape, factor=pair.scale)

    def _check_rows(self, tensor: str, indices: list[int], shape: tuple[int, ...], entry: Entry | None) -> None:
        outside = [row for row in indices if entry is not None and not 0 <= row < entry.rows]
        width = () if entry is None else entry.shape[1:]
        if len(set(indices)) != len(indices) or outside or shape != (len(indices), *(width or shape[1:])):
            raise self._contradiction(
                f"trainable_token_indices says rows {indices[:8]} of {tensor} {list(entry.shape) if entry else ''} "
                f"and the file holds {list(shape)}"
            )

    def _refuse_older_ours(self) -> None:
        told = ((self.adapter.extension or {}).get("layout") or {}).get("tie_word_embeddings")
        embedding, head = _module(self.tables.embedding), _module(self.tables.head)
        pairs = self.pairs
        if told and self.tables.declared and embedding in pairs and head not in pairs and not self.ties_factors:
            raise UserError(
                f"adapter={self.adapter.path} was made by an older longctx for a base whose output layer is its "
                "embedding, without telling peft so: peft would move the embedding alone. Extract it again, or write "
                '"ensure_weight_tying": true into its adapter_config.json (nothing was written)'
            )

    def _contradiction(self, what: str) -> UserError:
        return UserError(
            f"adapter={self.adapter.path} cannot be merged into target={self.target.path}: {what}; file and "
            "adapter_config.json do not belong together, save the adapter again (nothing was written)"
        )


def _module(tensor: str | None) -> str | None:
    return tensor.rsplit(".", 1)[0] if tensor is not None else None


def _only_vocabulary_differs(entry: Entry, shape: tuple[int, ...]) -> bool:
    return classify(entry) in (WeightKind.EMBEDDING, WeightKind.HEAD) and entry.shape[1:] == shape[1:]


def _equal(left: StoredTensors, first: str, right: StoredTensors, second: str) -> bool:
    """Whether two tensors hold the same numbers in the dtype of the first."""
    one, dtype = left.entries[first], DTYPES[left.entries[first].dtype]
    if one.shape != right.entries[second].shape:
        return False
    return all(torch.equal(left.read(first, *rows), right.read(second, *rows).to(dtype)) for rows in row_blocks(one))


def layout_differences(extension: Mapping[str, Any] | None, target: Mapping[str, Any]) -> list[str]:
    """The differences between the head layouts of the adapter's base and the target, which shapes may not show."""
    known = (extension or {}).get("layout") or {}
    keys = ("model_type", "num_attention_heads", "num_key_value_heads", "head_dim")
    return [f"{key} {known[key]} / {target.get(key)}" for key in keys if key in known and known[key] != target.get(key)]
