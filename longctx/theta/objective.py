"""The objective of a theta search: a model's loss on weighted tokens, with ring attention over several ranks.

Each candidate may first be trained for a few optimizer steps. They are undone afterwards, so every candidate starts
from the same weights.

B = 1 sequence, S tokens of the stage, n of them on this rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from longctx.config.model import MemoryConfig
from longctx.config.train import EngineConfig, OptimConfig
from longctx.model import LossModel, set_rope
from longctx.model.loss import IGNORED
from longctx.theta.search_data import SearchData, WeightedSequence
from longctx.train.batch import MicroBatch
from longctx.train.replicated import ReplicatedEngine

if TYPE_CHECKING:
    from longctx.attention import ContextParallel
    from longctx.distributed.ranks import Ranks


@dataclass(frozen=True)
class Adaptation:
    """Optimizer steps per candidate as a training takes them: a micro-batch each, AdamW at rate lr, clipped to norm 1.

    batches: this rank's part of one sequence of the stage each.
    """

    batches: list[MicroBatch]
    lr: float


class Objective:
    """Computes the losses of one model, loaded with attention `longctx`, at any rope; all ranks get equal losses."""

    def __init__(
        self,
        model: Any,
        memory: MemoryConfig,
        cp: ContextParallel,
        ranks: Ranks,
        *,
        precision: Any = "float32",
    ) -> None:
        self.hf, self.cp, self.ranks, self.precision = model, cp, ranks, precision
        self.model = LossModel(model, memory)

    def losses(
        self, rope: Mapping[str, Any], data: SearchData, adapt: Adaptation | None = None
    ) -> tuple[float, float | None]:
        """Return (loss on the texts' last quarter, loss on the needles' answers) at this rope, in nats per token."""
        window = len(data.texts[0].tokens)
        set_rope(self.hf, rope, window, precision=self.precision)
        with self._adapted(adapt) if adapt and adapt.batches else nullcontext(), torch.no_grad():
            texts = self._mean(data.texts)
            needles = self._mean(data.needles) if data.needles else None
        return texts, needles

    def _mean(self, sequences: Sequence[WeightedSequence]) -> float:
        total = weight = 0.0
        self.model.eval()
        for sequence in sequences:
            out = self._forward(sequence)
            total += float(out.nll_sum)
            weight += float(out.weight_sum)
        total, weight = self.ranks.broadcast(self.ranks.sum([total, weight]))
        return total / weight

    def _forward(self, sequence: WeightedSequence) -> Any:
        tokens = torch.from_numpy(sequence.tokens)
        labels = torch.cat([tokens[1:], tokens.new_full((1,), IGNORED)])
        weights = torch.from_numpy(np.append(sequence.weights[1:], np.float32(0)))
        labels = torch.where(weights > 0, labels, IGNORED)
        layout = self.cp.layout(len(tokens), kind="zigzag")
        device = self.ranks.device
        local = [
            layout.shard(x, dim=0, fill=fill)[None].to(device)
            for x, fill in ((tokens, 0), (labels, IGNORED), (weights, 0.0))
        ]
        return self.model(local[0], layout.positions.to(device), local[1], local[2], layout)

    @contextmanager
    def _adapted(self, adapt: Adaptation) -> Iterator[None]:
        """Train the model for the adaptation steps; its weights are restored on leaving the context."""
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        before = [p.detach().clone() for p in parameters]
        try:
            self._train(adapt)
            yield
        finally:
            with torch.no_grad():
                for parameter, kept in zip(parameters, before, strict=True):
                    parameter.copy_(kept)

    def _train(self, adapt: Adaptation) -> None:
        """Take the adaptation steps; masters and moments are gone before the model is judged."""
        engine = ReplicatedEngine(EngineConfig(), OptimConfig(max_grad_norm=1.0), self.model, self.ranks)
        try:
            for batch in adapt.batches:
                weight = self.ranks.sum([batch.weight])[0]
                out = engine.forward(**batch.to(self.ranks.device).inputs)
                engine.backward(out.loss_sum * (self.ranks.world / max(weight, 1e-9)), last=True)
                engine.step(adapt.lr, float(engine.grad_norm()))
        finally:
            engine.close()
            for parameter in self.model.parameters():
                parameter.grad = None
