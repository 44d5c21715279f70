"""What an adapter will weigh and how long its extraction will take, before anything is read: arithmetic on
shapes.

Bytes = itemsize * rank * (rows + columns), summed over the matrices; published rank-32 adapters of
Llama-3-70B with lm_head weigh 837 MB, which this reproduces.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longctx.errors import UserError, nearest

# hidden, inner, layers, heads, kv heads, vocabulary (head_dim 128 in all), from the models' config.json.
_PRESETS: dict[str, tuple[int, int, int, int, int, int]] = {
    "llama3_8b": (4096, 14336, 32, 32, 8, 128256),
    "llama3_70b": (8192, 28672, 80, 64, 8, 128256),
    "llama3_405b": (16384, 53248, 126, 128, 8, 128256),
    "mistral_7b": (4096, 14336, 32, 32, 8, 32768),
    "qwen2_7b": (3584, 18944, 28, 28, 4, 152064),
}
ITEMSIZE = {"bfloat16": 2, "float16": 2, "float32": 4}


@dataclass(frozen=True)
class Size:
    """bytes: of the factors. elements: of the matrices to be decomposed. seconds: extrapolated, if
    measured.
    """

    model: str
    rank: int
    matrices: int
    elements: int
    bytes: int
    bytes_per_rank: int
    seconds: float | None = None
    throughput: float | None = None


def shapes_of(plan: str) -> list[tuple[str, int, int, int]]:
    """(projection, rows, columns, how many) of a preset, or of the model in a folder."""
    if plan in _PRESETS:
        hidden, inner, layers, heads, kv, vocab = _PRESETS[plan]
        return _decoder(hidden, inner, layers, heads * 128, kv * 128, vocab, tied=False)
    folder = Path(plan)
    if not (folder / "config.json").is_file():
        near = nearest(plan, _PRESETS)
        raise UserError(
            f"plan={plan} is neither a preset ({', '.join(_PRESETS)}) nor a folder with a config.json"
            + (f"; did you mean {near}?" if near else "")
            + " (configs/lora_info.yaml)"
        )
    try:
        return _from_config(json.loads((folder / "config.json").read_text()))
    except (KeyError, json.JSONDecodeError) as error:
        raise UserError(f"plan={plan}: its config.json does not say {error}; give a decoder's folder") from None


def plan_size(plan: str, rank: int, *, dtype: str, lm_head: bool, embeddings: bool) -> Size:
    """The size of a rank-`rank` adapter of the model's linear layers, and of lm_head and embeddings if
    asked.
    """
    shapes = shapes_of(plan)
    tied = all(name != "lm_head" for name, *_ in shapes)
    chosen = [
        (name, min(rank, rows, columns), rows, columns, count)
        for name, rows, columns, count in shapes
        if (lm_head or name != "lm_head") and (embeddings or name != "embed_tokens")
    ]
    # A tied embedding's factors are written for the output layer as well.
    times = {name: 2 if tied and name == "embed_tokens" else 1 for name, *_ in chosen}
    total = sum(times[name] * count * r * (rows + columns) for name, r, rows, columns, count in chosen)
    one = sum(times[name] * count * (rows + columns) for name, _, rows, columns, count in chosen)
    return Size(
        model=plan,
        rank=rank,
        matrices=sum(count for *_, count in chosen),
        elements=sum(rows * columns * count for _, _, rows, columns, count in chosen),
        bytes=total * ITEMSIZE[dtype],
        bytes_per_rank=one * ITEMSIZE[dtype],
    )


def measure_throughput(rank: int) -> float:
    """Elements per second that this machine decomposes at this rank, all cores: a 2048 x 2048 sample,
    repeated.
    """
    import os
    from concurrent.futures import ThreadPoolExecutor

    import torch

    from longctx.lora.lowrank import Sketch, decompose

    sample = _Sample(torch.randn(2048, 2048, generator=torch.Generator().manual_seed(0)))
    cores = min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(cores) as pool:
            list(pool.map(lambda _: decompose(sample, rank, Sketch()), range(cores)))
            began = time.perf_counter()
            list(pool.map(lambda _: decompose(sample, rank, Sketch()), range(2 * cores)))
            seconds = time.perf_counter() - began
    finally:
        torch.set_num_threads(before)
    return 2 * cores * 2048 * 2048 / seconds


class _Sample:
    """A matrix in memory as lowrank reads it."""

    def __init__(self, matrix: Any) -> None:
        self._matrix = matrix
        self.shape = (int(matrix.shape[0]), int(matrix.shape[1]))
        self.dtype, self.device = matrix.dtype, matrix.device

    def blocks(self) -> Any:
        for start in range(0, self.shape[0], 512):
            yield start, self._matrix[start : start + 512]

    def dense(self) -> None:
        return None


def _from_config(config: Mapping[str, Any]) -> list[tuple[str, int, int, int]]:
    inner = {**config, **(config.get("text_config") or {})}
    heads = inner["num_attention_heads"]
    head_dim = inner.get("head_dim") or inner["hidden_size"] // heads
    kv = inner.get("num_key_value_heads") or heads
    return _decoder(
        inner["hidden_size"], inner["intermediate_size"], inner["num_hidden_layers"], heads * head_dim,
        kv * head_dim, inner["vocab_size"], tied=bool(inner.get("tie_word_embeddings")),
    )  # fmt: skip


def _decoder(
    hidden: int, inner: int, layers: int, query: int, kv: int, vocab: int, *, tied: bool
) -> list[tuple[str, int, int, int]]:
    shapes = [
        ("q_proj", query, hidden, layers),
        ("k_proj", kv, hidden, layers),
        ("v_proj", kv, hidden, layers),
        ("o_proj", hidden, query, layers),
        ("gate_proj", inner, hidden, layers),
        ("up_proj", inner, hidden, layers),
        ("down_proj", hidden, inner, layers),
        ("embed_tokens", vocab, hidden, 1),
    ]
    return shapes if tied else [*shapes, ("lm_head", vocab, hidden, 1)]
