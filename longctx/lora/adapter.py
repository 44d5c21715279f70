"""Reads a LoRA in PEFT's format, whether longctx, mergekit or peft wrote it, and what longctx stores beside it.

The tensors are sorted by what PEFT does with them when it loads the file. Adapters that cannot be added to weights are
refused with the reason, here or by PeftSettings.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from longctx.errors import UserError
from longctx.lora.peftconfig import PeftSettings
from longctx.lora.tensors import StoredTensors

EXTENSION_FILE = "longctx.json"
NORM_STEM = "norm_deltas"
_PREFIX = "base_model.model."
_FACTOR = re.compile(r"(.+)\.(?:lora_([AB])(?:\.default)?\.weight|lora_embedding_([AB])(?:\.default)?)")
_FACTOR_BIAS = re.compile(r"(.+)\.lora_B(?:\.default)?\.bias")
_ROWS = re.compile(r"(.+)\.token_adapter\.trainable_tokens_delta(?:\.default)?")
_INNER = re.compile(r"(.+?)\.(token_adapter\.base_layer|base_layer|original_module)\.(weight|bias)")
# PEFT writes these when it saves embeddings whole: a buffer, and copies of tensors under their plain names.
_UNREAD = re.compile(r".+\.(modules_to_save\.\w+|token_adapter\.trainable_tokens_original(?:\.default)?)")


@dataclass(frozen=True)
class FactorPair:
    """The factors of one module: delta = scale * B @ A, transposed for an embedding.

    a, b: tensor names. shape: [rows, columns] of the delta, as the weight has them in a model.
    """

    module: str
    a: str
    b: str
    embedding: bool
    rank: int
    scale: float
    shape: tuple[int, int]


class Adapter:
    """An adapter in a folder or on the hub.

    settings: adapter_config.json. pairs: the factors, by module. whole: tensors stored under the model's names
    (modules_to_save, resized embeddings, trained biases). inner: tensors of layers that the adapter wraps, by the
    model's name (trained biases, copies of the base's embeddings). biases: biases of factors, by module. rows: single
    rows of an embedding, by module. deltas: names of norms and biases whose exact differences are in
    norm_deltas.safetensors. extension: longctx.json, or None.

    whole, inner, biases and rows map to the tensor's name in the file. Raises UserError when a factor lacks its
    partner, and when adding to weights cannot express the adapter.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.weights = StoredTensors(path, what="adapter", stem="adapter_model")
        self.weights.require_floats()
        self.config = self.weights.config("adapter_config.json")
        self.settings = PeftSettings(self.config, f"adapter={path}")
        self.extension = self.weights.config(EXTENSION_FILE) if self.weights.source.exists(EXTENSION_FILE) else None
        self.norm_deltas: StoredTensors | None = None
        if self.weights.source.exists(f"{NORM_STEM}.safetensors"):
            self.norm_deltas = StoredTensors(path, what="adapter", stem=NORM_STEM)
        self.pairs: dict[str, FactorPair] = {}
        self.whole: dict[str, str] = {}
        self.inner: dict[str, str] = {}
        self.biases: dict[str, str] = {}
        self.rows: dict[str, str] = {}
        self._sort_tensors()

    @property
    def bytes(self) -> int:
        """The size of an adapter wherever one is told: of the factors' files on the disk, headers included."""
        return sum(self.weights.source.fetch(file).stat().st_size for file in self.weights.files)

    @property
    def deltas(self) -> list[str]:
        return list(self.norm_deltas.entries) if self.norm_deltas is not None else []

    def factors(self, pair: FactorPair) -> tuple[Tensor, Tensor]:
        """Read (left [rows, r], right [r, columns]) in float32, with delta = pair.scale * left @ right."""
        a, b = self.weights.read(pair.a).float(), self.weights.read(pair.b).float()
        return (a.T.contiguous(), b.T.contiguous()) if pair.embedding else (b, a)

    def delta(self, name: str) -> Tensor:
        """Read the exact difference of a norm or bias."""
        assert self.norm_deltas is not None
        return self.norm_deltas.read(name)

    def close(self) -> None:
        self.weights.close()
        if self.norm_deltas is not None:
            self.norm_deltas.close()

    def __enter__(self) -> Adapter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _sort_tensors(self) -> None:
        halves: dict[tuple[str, bool], dict[str, str]] = {}
        for stored, plain in self._plain_names():
            if factor := _FACTOR.fullmatch(plain):
                module, half, embedding_half = factor.groups()
                halves.setdefault((module, half is None), {})[half or embedding_half] = stored
            elif bias := _FACTOR_BIAS.fullmatch(plain):
                self.biases[bias[1]] = stored
            elif rows := _ROWS.fullmatch(plain):
                self.rows[rows[1]] = stored
            elif inner := _INNER.fullmatch(plain):
                self.inner[f"{inner[1]}.{inner[3]}"] = stored
            elif "lora_" in plain:
                raise UserError(
                    f"adapter={self.path}: {stored} is neither a factor nor a weight; longctx merges plain LoRA "
                    "factors, trained rows and saved modules only"
                )
            elif not _UNREAD.fullmatch(plain):
                self.whole[plain] = stored
        lonely = [module for (module, _), pair in halves.items() if len(pair) != 2]
        if lonely:
            raise UserError(
                f"adapter={self.path}: {len(lonely)} modules have one factor without the other: "
                f"{', '.join(lonely[:5])}; the file is incomplete, fetch it again (nothing was written)"
            )
        for (module, embedding), pair in halves.items():
            if module in self.pairs:
                raise UserError(f"adapter={self.path}: {module} has factors of a linear layer and of an embedding")
            self.pairs[module] = self._pair(module, pair["A"], pair["B"], embedding)

    def _plain_names(self) -> Iterator[tuple[str, str]]:
        odd = [name for name in self.weights.entries if not name.startswith(_PREFIX)]
        if odd:
            raise UserError(
                f"adapter={self.path}: {len(odd)} tensors do not begin with {_PREFIX}, so peft ignores them: "
                f"{', '.join(odd[:5])}; save the adapter with peft's save_pretrained"
            )
        for name in self.weights.entries:
            yield name, name.removeprefix(_PREFIX)

    def _pair(self, module: str, a: str, b: str, embedding: bool) -> FactorPair:
        first, second = self.weights.entries[a], self.weights.entries[b]
        if len(first.shape) != 2 or len(second.shape) != 2 or first.shape[0] != second.shape[1]:
            raise UserError(
                f"adapter={self.path}: the factors of {module} do not fit each other: A {list(first.shape)}, B "
                f"{list(second.shape)}; A is [rank, in] and B is [out, rank] (nothing was written)"
            )
        rank = first.shape[0]
        shape = (first.shape[1], second.shape[0]) if embedding else (second.shape[0], first.shape[1])
        told = self.settings.rank(module)
        if told != rank:
            raise UserError(
                f"adapter={self.path}: adapter_config.json says rank {told} for {module} and its factors have "
                f"{rank}; file and config do not belong together (nothing was written)"
            )
        return FactorPair(module, a, b, embedding, rank, self.settings.scale(module), shape)
