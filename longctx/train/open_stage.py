"""Opens a stage on this rank: sets RoPE, opens the context-parallel group and packs the documents.

cp is chosen for each stage: as many ranks as a sequence needs to fit, so that short stages use their ranks for
different sequences. Groups are opened and closed with the stage, since groups that are never destroyed leak.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist

from longctx.decide import Decision, Machines, Shares, decide, ring_words
from longctx.distributed.ranks import Ranks
from longctx.dtype import BYTES
from longctx.shape import Flops, shape_of
from longctx.topology import split
from longctx.train import identity, runfolder
from longctx.train.batch import MicroBatch, micro_batch
from longctx.train.checks import cache_folder
from longctx.train.engine import Engine

if TYPE_CHECKING:
    from longctx.attention import ContextParallel
    from longctx.config.model import ModelConfig
    from longctx.config.train import TrainConfig
    from longctx.curriculum import Stage
    from longctx.data.corpus import Split
    from longctx.data.stage_data import StageData
    from longctx.model import LossModel


@dataclass(kw_only=True)
class OpenStage:
    """An open stage on this rank; its owner closes it.

    data, heldout: its packed training and held-out documents. source: the model that training began with. flops:
    floating point operations per token and query-key pair. rings: the schedule and links of attention, in words.
    """

    stage: Stage
    cp: ContextParallel
    cp_size: int
    shares: Shares
    data: StageData
    heldout: StageData | None
    tokenizer: Any
    source: ModelConfig
    group: dist.ProcessGroup | None
    words: str
    rings: str
    flops: Flops

    def micro_batches(self, cursor: int) -> list[MicroBatch]:
        """This rank's micro-batches of the step that begins at the global cursor."""
        return [self._batch(self.data, indices) for indices in self.shares.sequences(cursor)]

    def _batch(self, data: Any, indices: Sequence[int]) -> MicroBatch:
        tail = self.stage.advance is not None
        return micro_batch(data, indices, self.cp, self.stage.layout, tail=tail)

    @torch.no_grad()
    def heldout_loss(self, engine: Engine, ranks: Ranks) -> float | None:
        """The mean loss on held-out sequences of this stage (nats per token); None without any. A collective."""
        if self.heldout is None or len(self.heldout) == 0:
            return None
        dp = self.shares.dp
        total, weight = 0.0, 0.0
        for index in range(self.shares.dp_rank, -(-len(self.heldout) // dp) * dp, dp):
            real = index < len(self.heldout)  # every group does equally many, also where dp does not divide them
            batch = self._batch(self.heldout, [index if real else 0]).to(ranks.device)
            out = engine.forward(**batch.inputs)
            if real:
                total, weight = total + float(out.nll_sum), weight + batch.weight
        total, weight = ranks.sum([total, weight])
        return total / weight if weight > 0 else None

    def export(self, engine: Engine, ranks: Ranks, out: Path) -> None:
        """Write this stage's model as a Hugging Face folder. A collective: all ranks give their shares."""
        from longctx.model.export import export

        state = engine.state_for_export()
        with ranks.agree(f"exporting {out}"):
            try:
                export(
                    state, self.source, self.tokenizer, out,
                    rope=self.stage.rope, window=self.stage.window, write=ranks.first,
                )  # fmt: skip
            finally:
                for _ in state:  # after a failed export: the other ranks wait in the remaining collectives
                    pass

    def close(self) -> None:
        self.cp.close()
        if self.group is not None:
            dist.destroy_process_group(self.group)


def open_stage(config: TrainConfig, stage: Stage, ranks: Ranks, model: LossModel, tokenizer: Any) -> OpenStage:
    """Open a stage, as a collective. Raises UserError for settings or data that do not fit."""
    from longctx.model import set_rope

    shape = shape_of(cast(Any, model.model).config.to_dict(), "the model's config")
    machines = Machines(ranks.world, ranks.local_world)
    decision = decide(stage, config.parallel, config.engine, machines, (shape.heads, shape.kv_heads))
    set_rope(model.model, stage.rope, stage.window, precision=config.model.rotary)
    opened = partial(_open_data, config, stage, ranks, tokenizer, shape.vocab)
    data = opened("train", stage.steps * stage.batch)
    count = config.evaluate.heldout_sequences
    heldout = opened("heldout", count) if count else None
    wanted = config.model.attention_kernel
    kernel, seconds = None if wanted == "auto" else wanted, config.engine.timeout_seconds
    cp, group = open_context_parallel(decision, ranks, kernel, seconds)
    words = (
        f"{stage.seq_len:,} tokens, theta {stage.theta:,.0f}, {stage.steps} steps of {stage.batch}, "
        f"dp {decision.dp} x cp {decision.cp}, {decision.per_forward} per forward"
    )
    rings = ring_words(decision, machines)
    tokens = decision.per_forward * -(-stage.seq_len // decision.cp)
    flops = shape.trained_flops(config.model.memory, BYTES[config.model.dtype], tokens)
    return OpenStage(
        stage=stage, cp=cp, cp_size=decision.cp, shares=decision.shares(ranks.rank), data=data, heldout=heldout,
        tokenizer=tokenizer, source=config.model, group=group, words=words, rings=rings, flops=flops,
    )  # fmt: skip


def _open_data(
    config: TrainConfig, stage: Stage, ranks: Ranks, tokenizer: Any, vocabulary: int, split: Split,
    sequences: int,
) -> Any:  # fmt: skip
    from longctx.data import open_stage_data

    def opened() -> Any:
        return open_stage_data(
            config.data, mix=stage.mix, seq_len=stage.seq_len, sequences=sequences, tokenizer=tokenizer,
            seed=config.seed, split=split, cache=cache_folder(config), stage=stage.name, vocab_size=vocabulary,
            remarks=False,  # the check of all stages has warned already
        )  # fmt: skip

    made: Any = None
    with ranks.agree(f"preparing the data of stage {stage.name}"):
        if ranks.local_rank == 0:  # one rank per node tokenizes and packs, the others read
            made = opened()
            if ranks.first and split == "train":
                runfolder.check_documents(config, made.contents)
    identity.check_nodes(ranks, identity.hashes_of(made.contents) if made is not None else None)
    return made if made is not None else opened()


def open_context_parallel(
    decision: Decision, ranks: Ranks, kernel: str | None, timeout_seconds: float | None = None
) -> tuple[Any, dist.ProcessGroup | None]:
    """The ContextParallel of this rank's cp group, and that group.

    kernel: the attention kernel's name, None: any. timeout_seconds: how long a transfer may wait for a rank (None:
    torch's default, since torch does not hand the world's timeout on to new groups).
    """
    from longctx.attention import ContextParallel
    from longctx.distributed.transport import SingleRankTransport

    cp = decision.cp
    own: dist.ProcessGroup | None = None
    timeout = None if timeout_seconds is None else timedelta(seconds=timeout_seconds)
    if 1 < cp < ranks.world:
        for first in range(0, ranks.world, cp):
            group: Any = dist.new_group(list(range(first, first + cp)), timeout=timeout)
            if first <= ranks.rank < first + cp:
                own = group
    if cp == 1:
        return ContextParallel(SingleRankTransport(), split(1, 1), kernel=kernel), None
    schedule: Any = decision.schedule
    ulysses = decision.ulysses if schedule == "ulysses_ring" else None
    made = ContextParallel.from_world(
        decision.nodes, schedule, ulysses, group=own, timeout=timeout_seconds, kernel=kernel
    )
    return made, own
