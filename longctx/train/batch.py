"""Turns packed sequences into one rank's micro-batch: tokens, shifted labels, weights, positions and layout.

Labels are shifted before the sequence is sharded, so that the last token of a shard has the right label. The sequences
of a micro-batch become rows where they have the same document boundaries, and one flattened row otherwise. Both are
exact, since no document attends to another.

Legend: B rows, S tokens per row, S_local tokens of a row on this rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from longctx.model.host import to_device
from longctx.model.loss import IGNORED


@dataclass
class MicroBatch:
    """The input of one forward and backward pass on this rank.

    inputs: the arguments of LossModel.forward; targets is among them and stays on the host, since the host knows which
    tokens have a label and would wait for a device that tells.
    weight: the sum of loss weights on this rank.
    tokens: this rank's tokens, without the layout's padding.
    pairs: query-key pairs of the whole rows, for the FLOP count.
    documents: returns the names of the documents in it.
    tail: loss weights [B, S_local] of the last quarter of each sequence, only where a stage asks for them.
    """

    inputs: dict[str, Any]
    weight: float
    tokens: int
    pairs: float
    documents: Callable[[], list[str]]
    tail: torch.Tensor | None = None

    def to(self, device: torch.device) -> MicroBatch:
        """The micro-batch on a device; on a GPU the copies start and the host goes on."""
        if device.type == "cpu":
            return self

        def moved(value: Any) -> Any:
            return to_device(value, device) if isinstance(value, torch.Tensor) else value

        return replace(self, inputs={key: moved(value) for key, value in self.inputs.items()}, tail=moved(self.tail))


def micro_batch(data: Any, indices: Sequence[int], context: Any, kind: str, *, tail: bool = False) -> MicroBatch:
    """Make this rank's micro-batch (CPU tensors) of the sequences `indices` of a data.StageData.

    Only this rank's tokens are read. context: the ContextParallel of the stage. kind: the layout of a row over its
    ranks. tail: also give the loss weights of the last quarter of each sequence.
    """
    bounds = [np.asarray(data.boundaries(index), dtype=np.int64) for index in indices]
    length = data.seq_len
    pairs = float(sum((np.diff(b) * (np.diff(b) + 1) // 2).sum() for b in bounds))
    if all(np.array_equal(b, bounds[0]) for b in bounds[1:]):
        rows, documents = [[index] for index in indices], bounds[0]
    else:  # one row: the documents of all sequences in order
        rows = [list(indices)]
        documents = np.concatenate([[0], *(b[1:] + place * length for place, b in enumerate(bounds))])
    with context.lock:  # this may run on the data thread while attention reads the same plans
        layout = context.layout(int(documents[-1]), documents=documents, kind=kind, positions="document")
    held = layout.indices.numpy()
    parts = [_row(data, row, held, length) for row in rows]
    tokens, labels, weights = (np.stack(arrays) for arrays in zip(*parts, strict=True))
    labels[weights == 0] = IGNORED
    arrays = {"input_ids": tokens, "labels": labels}
    # Without weights LossModel takes 1 for every label and skips the products.
    if (weights[weights != 0] != 1).any():
        arrays["weights"] = weights
    inputs = {name: torch.from_numpy(array) for name, array in arrays.items()}
    targets = np.flatnonzero(labels != IGNORED)
    inputs |= {"positions": layout.positions, "layout": layout, "targets": targets}
    late = torch.from_numpy(np.where(held % length >= length * 3 // 4, weights, np.float32(0))) if tail else None
    weight = float(weights.sum(dtype=np.float64))
    real = len(rows) * int((held >= 0).sum())
    return MicroBatch(inputs, weight, real, pairs, partial(_names, data, tuple(indices)), late)


def _row(data: Any, indices: Sequence[int], held: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens (int64), labels (int64) and weights (float32), each [S_local], of the row's positions `held`.

    A position of -1 is padding. A label is the next token of the same sequence, on whichever rank that token lies.
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
