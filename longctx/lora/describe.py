"""Describes an adapter from its files alone: its modules, their spectra, and the rope and window it carries.

Spectra come from the factors, whoever made them: with A^T = Q_a R_a and B = Q_b R_b, the singular values of B A are
those of the r x r matrix R_b R_a^T.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from longctx.lora.adapter import Adapter
from longctx.rope.config import describe_rope


@dataclass(frozen=True)
class ModuleInfo:
    """One module of an adapter.

    spectrum: singular values of scale * B A, descending. share: the kept share of the difference's squared norm, or
    None if it is unknown.
    """

    module: str
    rank: int
    scale: float
    shape: tuple[int, int]
    spectrum: list[float]
    share: float | None


@dataclass(frozen=True)
class AdapterInfo:
    """The description of an adapter.

    bytes: see Adapter.bytes. exact: number of exact differences of norms and biases. replaced: tensors saved whole.
    share: the kept share of the squared norm of all factors. extends: whether the adapter carries another rope or
    window than the base's. one_weight: the factors of the embedding are those of the output layer too (see
    folder.ONE_WEIGHT).
    """

    path: str
    base: str | None
    bytes: int
    modules: list[ModuleInfo]
    exact: int
    replaced: list[str]
    window: int | None
    rope: str | None
    share: float | None
    extends: bool
    one_weight: bool


def describe(path: str) -> AdapterInfo:
    """Describe the adapter in a folder or on the hub; raises UserError if it is none."""
    with Adapter(path) as adapter:
        side = adapter.extension or {}
        known = side.get("tensors", {})
        modules = [
            ModuleInfo(
                pair.module, pair.rank, pair.scale, pair.shape, _spectrum(adapter, pair),
                known.get(f"{pair.module}.weight", {}).get("share"),
            )
            for pair in adapter.pairs.values()
        ]  # fmt: skip
        rope = side.get("rope_parameters")
        return AdapterInfo(
            path=path,
            base=adapter.config.get("base_model_name_or_path"),
            bytes=adapter.bytes,
            modules=sorted(modules, key=lambda item: _place(item.module)),
            exact=len(adapter.deltas),
            replaced=[*adapter.whole, *adapter.inner, *(f"{module} (rows)" for module in adapter.rows)],
            window=side.get("window"),
            rope=describe_rope(rope) if rope else None,
            share=side.get("share", {}).get("factors"),
            extends=bool(side.get("extends")),
            one_weight=bool(adapter.config.get("ensure_weight_tying")),
        )


def _spectrum(adapter: Adapter, pair: Any) -> list[float]:
    left, right = adapter.factors(pair)
    first = torch.linalg.qr(left, mode="r")[1]
    second = torch.linalg.qr(right.T, mode="r")[1]
    values = torch.linalg.svdvals(first.double() @ second.double().T) * pair.scale
    return [float(f"{value:.6g}") for value in values.tolist()]


def _place(module: str) -> tuple[int, str]:
    """A sort key for modules: by layer, and modules outside the layers last."""
    layer = layer_of(module)
    return (10**6 if layer is None else layer), module


def layer_of(module: str) -> int | None:
    """The number of the layer in a module's name, or None for a module outside the layers."""
    return next((int(part) for part in module.split(".") if part.isdigit()), None)
