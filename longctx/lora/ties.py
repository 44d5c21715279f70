"""Decides, as transformers 5 does, whether the embedding and the output layer of a model are one weight or two.

The config says whether they are tied. A file may store a tied weight under both names (one weight if the numbers agree,
two if they differ), under the embedding's name, or under the output layer's name. `resolve_ties` leaves one name for
one weight, so that later code cannot change only half of a pair.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from longctx.errors import UserError
from longctx.lora.modules import WeightKind, classify
from longctx.lora.tensors import Entry, StoredTensors, row_blocks
from longctx.shape import text_section
from longctx.storage.writer import DTYPES

# Rotary decoders whose configuration class ties by default, for a config.json without tie_word_embeddings.
TIED_BY_DEFAULT = frozenset({
    "cohere", "cohere2", "ernie4_5", "ernie4_5_moe", "falcon", "gemma", "gemma2", "gemma3", "gemma3_text",
    "gemma3n", "gemma3n_text", "jetmoe", "lfm2", "lfm2_moe", "minicpm3", "modernbert-decoder",
    "recurrent_gemma", "smollm3", "starcoder2", "vaultgemma", "zamba2",
})  # fmt: skip


@dataclass(frozen=True)
class EmbeddingTables:
    """The embedding and the output layer of a model.

    embedding, head: tensor names, or None if the model has no such tensor. declared: the config ties them (PEFT uses
    this). shared: transformers loads one weight for both. note: how the file differs from the usual layout, or None.
    """

    embedding: str | None
    head: str | None
    declared: bool
    shared: bool
    note: str | None = None

    @property
    def both(self) -> tuple[str, ...]:
        return tuple(name for name in (self.embedding, self.head) if name is not None)


def resolve_ties(tensors: StoredTensors) -> EmbeddingTables:
    """Drop or rename entries so that a shared weight is only under the embedding's name.

    Raises UserError when the config does not tie and one of the two tensors is missing.
    """
    config = tensors.config()
    _restore_prefix(tensors)
    embedding, head = _find(tensors, WeightKind.EMBEDDING), _find(tensors, WeightKind.HEAD)
    declared = _declared(config, head is not None and embedding is not None)
    if embedding is None and head is None:
        return EmbeddingTables(None, None, declared=False, shared=False)
    if embedding is not None and head is not None:
        return _resolve_both(tensors, embedding, head, declared)
    stored = embedding or head
    assert stored is not None
    if not declared:
        _refuse_missing(tensors, config, stored)
        return EmbeddingTables(
            embedding.name if embedding else None, head.name if head else None, declared=False, shared=False
        )
    if embedding is not None:
        return EmbeddingTables(embedding.name, _head_of(embedding.name), declared=True, shared=True)
    name = _embedding_of(tensors, stored.name)
    tensors.rename({stored.name: name})
    return EmbeddingTables(
        name, stored.name, True, True, f"{stored.name} is the tied weight's stored name; it is {name} now"
    )


def resolve_ties_of_pair(base: StoredTensors, tuned: StoredTensors) -> tuple[str | None, bool]:
    """Resolve the ties of base and tuned.

    Returns the output layer that shares the embedding's difference (None if they have separate differences), and
    whether either model is tied. If only one of the models is tied, its weight gets both names.
    """
    first, second = resolve_ties(base), resolve_ties(tuned)
    if first.shared and second.shared:
        return first.head, True
    _separate(base, first)
    _separate(tuned, second)
    return None, first.shared or second.shared


def _separate(tensors: StoredTensors, tables: EmbeddingTables) -> None:
    """Put a shared weight under both of its names."""
    if tables.shared:
        assert tables.embedding is not None
        assert tables.head is not None
        tensors.entries[tables.head] = replace(tensors.entries[tables.embedding], name=tables.head)


def _resolve_both(tensors: StoredTensors, embedding: Entry, head: Entry, declared: bool) -> EmbeddingTables:
    if not declared:
        return EmbeddingTables(embedding.name, head.name, declared=False, shared=False)
    if _equal(tensors, embedding, head):
        del tensors.entries[head.name]
        note = f"{head.name} was stored beside {embedding.name} with the same numbers; the tied weight is stored once"
        return EmbeddingTables(embedding.name, head.name, True, True, note)
    note = (
        f"config.json ties {head.name} to {embedding.name}, and the file stores different numbers for them: "
        "transformers loads two weights, and so does longctx"
    )
    return EmbeddingTables(embedding.name, head.name, True, False, note)


def _declared(config: Mapping[str, Any], stores_both: bool) -> bool:
    said = config.get("tie_word_embeddings", text_section(config).get("tie_word_embeddings"))
    if said is not None:
        return bool(said)
    return not stores_both or config.get("model_type") in TIED_BY_DEFAULT


def _find(tensors: StoredTensors, kind: WeightKind) -> Entry | None:
    """The model's own tensor of this kind; the tensors of prediction or vision parts have longer names."""
    found = [entry for entry in tensors.entries.values() if classify(entry) is kind]
    return min(found, key=lambda entry: (entry.name.count("."), len(entry.name)), default=None)


def _equal(tensors: StoredTensors, first: Entry, second: Entry) -> bool:
    """Whether two tensors hold the same numbers after they are loaded in the model's dtype."""
    if first.shape != second.shape:
        return False
    config = tensors.config()
    said = str(config.get("dtype") or config.get("torch_dtype") or "").removeprefix("torch.")
    dtype = getattr(torch, said, None)
    dtype = dtype if isinstance(dtype, torch.dtype) else DTYPES[first.dtype]
    return all(
        torch.equal(tensors.read(first.name, *rows).to(dtype), tensors.read(second.name, *rows).to(dtype))
        for rows in row_blocks(first)
    )


def _restore_prefix(tensors: StoredTensors) -> None:
    """Add the prefix `model.`, as transformers does, to the names of a decoder saved without its output layer."""
    names = tensors.entries
    if "embed_tokens.weight" in names and any(name.startswith("layers.") for name in names):
        heads = {entry.name for entry in names.values() if classify(entry) is WeightKind.HEAD}
        tensors.rename({name: f"model.{name}" for name in names if name not in heads})


def _head_of(embedding: str) -> str:
    if embedding.endswith("embed_in.weight"):
        return "embed_out.weight"
    return "language_model.lm_head.weight" if embedding.startswith("language_model.") else "lm_head.weight"


def _embedding_of(tensors: StoredTensors, head: str) -> str:
    names = ("model.embed_tokens.weight", "language_model.model.embed_tokens.weight")
    prefix = "language_model.model.layers." if head.startswith("language_model.") else "model.layers."
    if not head.endswith("lm_head.weight") or not any(name.startswith(prefix) for name in tensors.entries):
        raise UserError(
            f"{tensors.what}={tensors.path} stores {head} and no embedding, and the name of its embedding "
            "does not follow from its other tensors; load it with transformers and save it again"
        )
    return names[head.startswith("language_model.")]


def _refuse_missing(tensors: StoredTensors, config: Mapping[str, Any], stored: Entry) -> None:
    if any("ForCausalLM" in str(name) for name in config.get("architectures") or []):
        other = "output layer" if classify(stored) is WeightKind.EMBEDDING else "input embedding"
        raise UserError(
            f"{tensors.what}={tensors.path} stores {stored.name} and no {other}, and its config.json says "
            "tie_word_embeddings: false, so transformers would draw that weight at random; set tie_word_embeddings "
            "to true if the two are one weight, or fetch the missing shard (config.json)"
        )
