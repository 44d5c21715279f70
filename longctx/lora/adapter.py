"""Reading any LoRA in PEFT's format: ours, mergekit's, peft's own; and our side files where they are.

Each pair of factors becomes a `Pair` with its scale (alpha / r, or alpha / sqrt(r) for rank-stabilized
LoRA, 2312.03732), by PEFT's rules for rank and alpha patterns. What cannot be added to weights is refused
with its reason.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from longctx.errors import UserError
from longctx.lora.tensors import Checkpoint

SIDE_FILE = "longctx.json"
NORM_STEM = "norm_deltas"
_PREFIX = "base_model.model."
_SUFFIXES = {
    ".lora_A.weight": ("a", False),
    ".lora_B.weight": ("b", False),
    ".lora_embedding_A": ("a", True),
    ".lora_embedding_B": ("b", True),
}


@dataclass(frozen=True)
class Pair:
    """delta = scale * B @ A for module `module`, transposed for an embedding.

    a, b: tensor names. shape: of the delta as the weight stands in a checkpoint, [rows, columns].
    """

    module: str
    a: str
    b: str
    embedding: bool
    rank: int
    scale: float
    shape: tuple[int, int]


class Adapter:
    """An adapter folder or hub id.

    pairs: by module. replacements: whole tensors (modules_to_save, trained biases) by the model's tensor
    name. deltas: exact differences of norms and biases from our side file, by tensor name. extension: our
    longctx.json, or None. Raises UserError when a factor lacks its partner or the adapter is of a kind that
    no sum of weights expresses.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.weights = Checkpoint(path, what="adapter", stem="adapter_model")
        self.config = self.weights.config("adapter_config.json")
        self.extension = self.weights.config(SIDE_FILE) if self.weights.source.exists(SIDE_FILE) else None
        self.side: Checkpoint | None = None
        if self.weights.source.exists(f"{NORM_STEM}.safetensors"):
            self.side = Checkpoint(path, what="adapter", stem=NORM_STEM)
        self._refuse_what_is_no_sum()
        self.pairs: dict[str, Pair] = {}
        self.replacements: dict[str, str] = {}
        self.copies: list[str] = []
        self._sort_tensors()

    @property
    def deltas(self) -> list[str]:
        return list(self.side.entries) if self.side is not None else []

    def factors(self, pair: Pair, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """(left [rows, r], right [r, columns]) with delta = pair.scale * left @ right."""
        a, b = self.weights.read(pair.a).to(dtype), self.weights.read(pair.b).to(dtype)
        return (a.T.contiguous(), b.T.contiguous()) if pair.embedding else (b, a)

    def delta(self, name: str) -> Tensor:
        """The exact difference of a norm or bias."""
        assert self.side is not None
        return self.side.read(name)

    def replacement(self, name: str, start: int, stop: int) -> Tensor:
        """Rows of a tensor that takes the place of the model's."""
        return self.weights.read(self.replacements[name], start, stop)

    def target_modules(self) -> list[str] | str:
        found = self.config.get("target_modules") or []
        return found if isinstance(found, str) else list(found)

    def covers(self, module: str) -> bool:
        """Whether target_modules names this module: a suffix of its name, or a pattern for the whole."""
        targets = self.target_modules()
        if isinstance(targets, str):
            return targets != "all-linear" and re.fullmatch(targets, module) is not None
        return any(module == target or module.endswith("." + target) for target in targets)

    @property
    def partial(self) -> bool:
        """Whether the config restricts the adapter to some layers, so that absent pairs are meant."""
        return bool(self.config.get("layers_to_transform") or self.config.get("exclude_modules"))

    def close(self) -> None:
        self.weights.close()
        if self.side is not None:
            self.side.close()

    def __enter__(self) -> Adapter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _sort_tensors(self) -> None:
        halves: dict[tuple[str, bool], dict[str, str]] = {}
        for name in self.weights.entries:
            plain = name.removeprefix(_PREFIX).replace(".default.", ".")
            suffix = next((suffix for suffix in _SUFFIXES if plain.endswith(suffix)), None)
            if suffix is not None:
                half, embedding = _SUFFIXES[suffix]
                halves.setdefault((plain.removesuffix(suffix), embedding), {})[half] = name
            elif "lora_" in plain:
                raise UserError(
                    f"adapter={self.path}: {name} is neither a factor nor a weight; longctx merges plain "
                    "LoRA factors and "
                    "saved modules only"
                )
            elif ".base_layer." in plain:
                self.copies.append(plain.replace(".base_layer.", "."))
            else:
                self.replacements[plain] = name
        lonely = [module for (module, _), pair in halves.items() if len(pair) != 2]
        if lonely:
            raise UserError(
                f"adapter={self.path}: {len(lonely)} modules have one factor without the other: "
                f"{', '.join(lonely[:5])}; the file "
                "is incomplete, fetch it again (nothing was written)"
            )
        for (module, embedding), pair in halves.items():
            self.pairs[module] = self._pair(module, pair["a"], pair["b"], embedding)

    def _pair(self, module: str, a: str, b: str, embedding: bool) -> Pair:
        first, second = self.weights.entries[a], self.weights.entries[b]
        if len(first.shape) != 2 or len(second.shape) != 2 or first.shape[0] != second.shape[1]:
            raise UserError(
                f"adapter={self.path}: the factors of {module} do not fit each other: A "
                f"{list(first.shape)}, B {list(second.shape)}; "
                "A is [rank, in] and B is [out, rank] (nothing was written)"
            )
        rank = first.shape[0]
        shape = (first.shape[1], second.shape[0]) if embedding else (second.shape[0], first.shape[1])
        told = self._pattern("rank_pattern", module, self.config.get("r", rank))
        if told != rank:
            raise UserError(
                f"adapter={self.path}: adapter_config.json says rank {told} for {module} and its factors "
                f"have {rank}; file and "
                "config do not belong together (nothing was written)"
            )
        return Pair(module, a, b, embedding, rank, self.scale(module, rank), shape)

    def scale(self, module: str, rank: int) -> float:
        alpha = self._pattern("alpha_pattern", module, self.config.get("lora_alpha", rank))
        return alpha / math.sqrt(rank) if self.config.get("use_rslora") else alpha / rank

    def _pattern(self, key: str, module: str, default: Any) -> Any:
        patterns: Mapping[str, Any] = self.config.get(key) or {}
        if module in patterns:
            return patterns[module]
        for pattern, value in patterns.items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
        return default

    def _refuse_what_is_no_sum(self) -> None:
        config = self.config
        init = config.get("init_lora_weights", True)
        reasons = {
            "DoRA rescales the sum, it is not a sum": config.get("use_dora"),
            "its peft_type is not LORA": config.get("peft_type", "LORA") != "LORA",
            "the factors have biases (lora_bias)": config.get("lora_bias"),
            "it stores transposed layers (fan_in_fan_out)": config.get("fan_in_fan_out"),
            "it repeats layers (layer_replication)": config.get("layer_replication"),
            "it targets bare parameters (target_parameters)": config.get("target_parameters"),
            f"its initialisation {init!r} changes the base's own weights; save it with peft's "
            "path_initial_model_for_weight_conversion": isinstance(init, str)
            and init.split("_")[0].lower() in ("pissa", "olora", "corda", "loftq", "lora-ga"),
        }
        for reason, holds in reasons.items():
            if holds:
                raise UserError(f"adapter={self.path} cannot be merged as a plain LoRA: {reason} (adapter_config.json)")
