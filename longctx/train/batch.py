"""From packed sequences to what one rank computes on: shifted labels, weights, positions, the layout, the
shard.

Labels are shifted before the sequence is sharded, so the token after a shard's end is the right one.
Sequences of one micro-batch become rows where they share their document boundaries, and one flattened row
with the documents' boundaries otherwise: exact either way, since no document reads another.

Legend: B rows, S tokens per row, S_local tokens of a row on this rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch

IGNORED = -100


@dataclass
class MicroBatch:
    """One forward's worth on this rank. inputs: what LossModel.forward takes.

    weight: sum of loss weights on this rank; tokens: of this rank, without the layout's padding; pairs: query-key
    pairs of the whole rows, for the FLOP count. documents: the names of what is in it, looked up when asked for.
    tail: loss weights [B, S_local] of the last quarter of each sequence only, where a stage asks for them.
    """

    inputs: dict[str, Any]
    weight: float
    tokens: int
    pairs: float
    documents: Callable[[], list[str]]
    tail: torch.Tensor | None = None

    def to(self, device: torch.device) -> MicroBatch:
        if device.type == "cpu":
            return self
        moved = {key: value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
                 for key, value in self.inputs.items()}  # fmt: skip
        return replace(self, inputs=moved, tail=None if self.tail is None else self.tail.to(device))


def micro_batch(data: Any, indices: Sequence[int], context: Any, kind: str, *, tail: bool = False) -> MicroBatch:
    """Sequences `indices` of a data.StageData as one forward of this rank (CPU tensors).

    context: the ContextParallel of the stage. kind: layout of a row over its ranks. Only this rank's tokens
    are read. tail: also give the loss weights of the last quarter of each sequence.
    """
    bounds = [np.asarray(data.boundaries(index), dtype=np.int64) for index in indices]
    length = data.seq_len
    pairs = float(sum((np.diff(b) * (np.diff(b) + 1) // 2).sum() for b in bounds))
    if all(np.array_equal(b, bounds[0]) for b in bounds[1:]):
        rows, documents = [[index] for index in indices], bounds[0]
    else:  # one row: the documents of all sequences behind each other
        rows = [list(indices)]
        documents = np.concatenate([[0], *(b[1:] + place * length for place, b in enumerate(bounds))])
    with context.lock:  # this may run on the data thread while attention reads the same plans
        layout = context.layout(int(documents[-1]), documents=documents, kind=kind, positions="document")
    held = layout.indices.numpy()
    parts = [_row(data, row, held, length) for row in rows]
    tokens, labels, weights = (np.stack(arrays) for arrays in zip(*parts, strict=True))
    labels[weights == 0] = IGNORED
    arrays = {"input_ids": tokens, "labels": labels, "weights": weights}
    inputs = {name: torch.from_numpy(array) for name, array in arrays.items()}
    inputs |= {"positions": layout.positions, "layout": layout}
    late = torch.from_numpy(np.where(held % length >= length * 3 // 4, weights, np.float32(0))) if tail else None
    weight = float(weights.sum(dtype=np.float64))
    real = len(rows) * int((held >= 0).sum())
    return MicroBatch(inputs, weight, real, pairs, partial(_names, data, tuple(indices)), late)


def _row(data: Any, indices: Sequence[int], held: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """tokens int64, labels int64, weights float32, each [S_local], at the row's positions `held` (-1:
    padding).

    A label is the token after its own within the same sequence, wherever that token lies.
    """
    tokens, labels = np.zeros(len(held), np.int64), np.full(len(held), IGNORED, np.int64)
    weights = np.zeros(len(held), np.float32)
    for place, index in enumerate(indices):
        here = np.flatnonzero(held // length == place) if len(indices) > 1 else np.flatnonzero(held >= 0)
        if len(here) == 0:
            continue
        own = data.local(index, held[here] % length)
        tokens[here], labels[here], weights[here] = own.tokens, own.labels, own.weights
    return tokens, labels, weights


def _names(data: Any, indices: Sequence[int]) -> list[str]:
    return list(dict.fromkeys(name for index in indices for name in data.documents(index)))
