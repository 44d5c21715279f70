"""Predicts the size of an adapter and the time of its extraction from the shapes of a model's matrices.

Bytes = itemsize * rank * (rows + columns), summed over the matrices; the files' headers, some hundred bytes a matrix,
come on top. This gives the 837 MB of published rank-32 adapters of Llama-3-70B with lm_head.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longctx.assets import config_folder
from longctx.errors import UserError, nearest
from longctx.shape import Shape, config_json, shape_of

# Short names of models whose config.json is in the package.
_PRESETS = {
    "llama3_8b": "meta-llama/Meta-Llama-3-8B",
    "llama3_70b": "meta-llama/Meta-Llama-3-70B",
    "llama3_405b": "meta-llama/Llama-3.1-405B",
    "mistral_7b": "mistralai/Mistral-7B-v0.3",
    "qwen2_7b": "Qwen/Qwen2-7B",
    "qwen3_8b": "Qwen/Qwen3-8B",
}
ITEMSIZE = {"bfloat16": 2, "float16": 2, "float32": 4}


def megabytes(size: float) -> str:
    """A size in bytes as every verb and page writes it: in MB of 10^6 bytes."""
    return f"{size / 1e6:.2f} MB" if size < 1e7 else f"{size / 1e6:.1f} MB"


@dataclass(frozen=True)
class AdapterSize:
    """The predicted size of an adapter.

    bytes: of the factors' numbers, without headers. elements: numbers in the matrices to decompose. seconds: time of
    the decomposition, extrapolated from `throughput` (elements per second); None unless it was measured.
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
    """The matrices (projection, rows, columns, count) of a preset, or of the model in a folder."""
    shape = _shape(plan)
    found = [(name, rows, columns, shape.layers) for name, (rows, columns) in shape.projections.items()]
    found.append(("embed_tokens", shape.vocab, shape.hidden, 1))
    return found if shape.tied else [*found, ("lm_head", shape.vocab, shape.hidden, 1)]


def _shape(plan: str) -> Shape:
    folder = Path(config_folder(_PRESETS.get(plan, plan)))
    if not (folder / "config.json").is_file():
        near = nearest(plan, _PRESETS)
        raise UserError(
            f"plan={plan} is neither a preset ({', '.join(_PRESETS)}) nor a folder with a config.json"
            + (f"; did you mean {near}?" if near else "")
            + " (configs/lora_info.yaml)"
        )
    return shape_of(*config_json(folder))


def adapter_size(plan: str, rank: int, *, dtype: str, lm_head: bool, embeddings: bool | None) -> AdapterSize:
    """Predict the size of a rank-`rank` adapter of the linear layers, and of lm_head and embeddings on request.

    embeddings: None takes those that are the output layer too, as `lora extract` does unless it is told otherwise.
    """
    shapes = shapes_of(plan)
    tied = all(name != "lm_head" for name, *_ in shapes)
    embeddings = tied if embeddings is None else embeddings
    chosen = [
        (name, min(rank, rows, columns), rows, columns, count)
        for name, rows, columns, count in shapes
        if (lm_head or name != "lm_head") and (embeddings or name != "embed_tokens")
    ]
    # The factors of a tied embedding are also written for the output layer.
    times = {name: 2 if tied and name == "embed_tokens" else 1 for name, *_ in chosen}
    total = sum(times[name] * count * r * (rows + columns) for name, r, rows, columns, count in chosen)
    one = sum(times[name] * count * (rows + columns) for name, _, rows, columns, count in chosen)
    return AdapterSize(
        model=plan,
        rank=rank,
        matrices=sum(count for *_, count in chosen),
        elements=sum(rows * columns * count for _, _, rows, columns, count in chosen),
        bytes=total * ITEMSIZE[dtype],
        bytes_per_rank=one * ITEMSIZE[dtype],
    )


def measure_throughput(rank: int) -> float:
    """Measure the elements per second that this machine decomposes at this rank, with 2048 x 2048 samples."""
    import os

    import torch

    from longctx.lora.lowrank import Sketch, decompose
    from longctx.threads import one_thread_each

    sample = _Sample(torch.randn(2048, 2048, generator=torch.Generator().manual_seed(0)))
    cores = min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    with one_thread_each(cores) as pool:
        list(pool.map(lambda _: decompose(sample, rank, Sketch()), range(cores)))
        began = time.perf_counter()
        list(pool.map(lambda _: decompose(sample, rank, Sketch()), range(2 * cores)))
        seconds = time.perf_counter() - began
    return 2 * cores * 2048 * 2048 / seconds


class _Sample:
    """A matrix in memory as a lowrank.BlockMatrix."""

    def __init__(self, matrix: Any) -> None:
        self._matrix = matrix
        self.shape = (int(matrix.shape[0]), int(matrix.shape[1]))
        self.dtype, self.device = matrix.dtype, matrix.device

    def blocks(self) -> Any:
        for start in range(0, self.shape[0], 512):
            yield start, self._matrix[start : start + 512]

    def dense(self) -> None:
        return None
