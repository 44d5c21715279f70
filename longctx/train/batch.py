"""From packed sequences to what one rank computes on: shifted labels, weights, positions, the layout, the shard.

Labels are shifted before the sequence is sharded, so the token after a shard's end is the right one. Sequences of
one micro-batch become rows where they share their document boundaries, and one flattened row with the documents'
boundaries otherwise: exact either way, since no document reads another.

Legend: B rows, S tokens per row, S_local tokens of a row on this rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from longctx.errors import UserError

if TYPE_CHECKING:
    from longctx.config.train import EngineConfig
    from longctx.curriculum import Stage

IGNORED = -100


@dataclass
class MicroBatch:
    """One forward's worth on this rank. inputs: what LossModel.forward takes.

    weight: sum of loss weights on this rank; pairs: query-key pairs of the whole rows, for the FLOP count.
    tail: loss weights [B, S_local] of the last quarter of each sequence only, where a stage asks for them.
    """

    inputs: dict[str, Any]
    weight: float
    tokens: int
    pairs: float
    documents: tuple[str, ...]
    tail: torch.Tensor | None = None

    def to(self, device: torch.device) -> MicroBatch:
        moved = {key: value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
                 for key, value in self.inputs.items()}  # fmt: skip
        tail = None if self.tail is None else self.tail.to(device)
        return MicroBatch(moved, self.weight, self.tokens, self.pairs, self.documents, tail)


@dataclass(frozen=True)
class Shares:
    """How a stage's batch falls onto ranks: dp groups take consecutive sequences, `per` of them per forward."""

    dp: int
    dp_rank: int
    per_rank: int
    per: int

    def sequences(self, cursor: int) -> list[list[int]]:
        """Indices of this rank's sequences of the step that begins at the global `cursor`, by micro-batch."""
        first = cursor + self.dp_rank * self.per_rank
        mine = list(range(first, first + self.per_rank))
        return [mine[at : at + self.per] for at in range(0, len(mine), self.per)]


def shares(stage: Stage, engine: EngineConfig, *, world: int, cp: int, rank: int, file: str) -> Shares:
    """Raises UserError where the batch does not divide over the data-parallel groups."""
    dp = world // cp
    if stage.batch % dp:
        fits = [c for c in range(cp, world + 1) if world % c == 0 and stage.batch % (world // c) == 0]
        hint = f"parallel.cp={fits[0]} fits, or" if fits else "take"
        raise UserError(
            f"curriculum.stages.{stage.name}.batch={stage.batch} sequences cannot be shared by the {dp} data-parallel "
            f"groups of {world} ranks with cp={cp}; {hint} a batch that is a multiple of {dp} ({file})"
        )
    per_rank = stage.batch // dp
    if engine.micro_batch == "auto":
        per = max(1, min(per_rank, engine.micro_batch_tokens * cp // stage.seq_len))
    else:
        per = engine.micro_batch
        if per < 1 or per_rank % per:
            fit = max(n for n in range(1, per_rank + 1) if per_rank % n == 0 and n <= max(per, 1))
            raise UserError(
                f"engine.micro_batch={per} does not divide the {per_rank} sequences that stage {stage.name} gives each "
                f"of the {dp} data-parallel groups; engine.micro_batch={fit} or auto fits (configs/engine)"
            )
    return Shares(dp, rank // cp, per_rank, per)


def micro_batch(sequences: Sequence[Any], cp: Any, kind: str, *, tail: bool = False) -> MicroBatch:
    """Pack data.PackedSequence items into one forward of this rank (CPU tensors).

    cp: the ContextParallel of the stage. kind: layout of the sequence over its ranks.
    """
    tokens = np.stack([item.tokens for item in sequences]).astype(np.int64)  # [B, S]
    weights = np.stack([item.weights for item in sequences]).astype(np.float32)
    boundaries = [np.asarray(item.boundaries, dtype=np.int64) for item in sequences]
    labels = np.full_like(tokens, IGNORED)
    shifted = np.zeros_like(weights)
    labels[:, :-1], shifted[:, :-1] = tokens[:, 1:], weights[:, 1:]  # shift within a sequence, before sharding
    labels[shifted == 0] = IGNORED
    late = np.where(np.arange(tokens.shape[1]) >= tokens.shape[1] * 3 // 4, shifted, 0.0).astype(np.float32)
    pairs = float(sum((np.diff(b).astype(np.float64) * (np.diff(b) + 1) / 2).sum() for b in boundaries))
    if all(np.array_equal(b, boundaries[0]) for b in boundaries[1:]):
        documents = boundaries[0]
    else:  # one row: the documents of all sequences behind each other
        length = tokens.shape[1]
        documents = np.concatenate([[0], *(b[1:] + row * length for row, b in enumerate(boundaries))])
        tokens, labels, shifted, late = (array.reshape(1, -1) for array in (tokens, labels, shifted, late))
    bounds = torch.from_numpy(documents) if len(documents) > 2 else None
    layout = cp.layout(seq_len=tokens.shape[1], documents=bounds, kind=kind)
    local = {name: layout.shard(torch.from_numpy(array), dim=1) for name, array in
             (("input_ids", tokens), ("labels", labels), ("weights", shifted))}  # fmt: skip
    positions = layout.positions if bounds is None else layout.document_positions
    names = tuple(dict.fromkeys(name for item in sequences for name in item.documents))
    inputs = {**local, "positions": positions, "layout": layout}
    weight = float(local["weights"].sum(dtype=torch.float64))
    last_quarter = layout.shard(torch.from_numpy(late), dim=1) if tail else None
    return MicroBatch(inputs, weight, local["input_ids"].numel(), pairs, names, last_quarter)
