"""How a stage falls onto ranks: context-parallel size, sequences per group and per forward.

Pure arithmetic, so that the planner and every rank of a training run ask the same question.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from longctx.curriculum import check_divides
from longctx.errors import UserError

if TYPE_CHECKING:
    from longctx.config.train import EngineConfig, ParallelConfig
    from longctx.curriculum import Stage

FILE = "configs/parallel and configs/curriculum"


def choose_cp(stage: Stage, parallel: ParallelConfig, world: int) -> int:
    """Ranks that hold one sequence of this stage. Raises UserError for a cp that the world or length refuses.

    auto: the smallest divisor of the world for which a rank holds at most parallel.tokens_per_rank tokens
    of a sequence and the batch divides over the groups; else the largest for which the batch divides.
    """
    fixed = parallel.stages.get(stage.name, parallel.cp)
    if not isinstance(fixed, str):  # a number, not "auto"
        if fixed < 1 or world % fixed:
            near = max(c for c in range(1, world + 1) if world % c == 0 and c <= max(fixed, 1))
            raise UserError(f"parallel.cp={fixed} does not divide the {world} ranks; {near} fits ({FILE})")
        check_divides(stage, fixed, FILE)
        return fixed
    parts = 2 if stage.layout == "zigzag" else 1
    fits = [cp for cp in range(1, world + 1) if world % cp == 0 and stage.batch % (world // cp) == 0]
    fits = [cp for cp in fits if cp == 1 or stage.seq_len % (parts * cp) == 0]
    if not fits:
        raise UserError(
            f"curriculum.stages.{stage.name}: batch={stage.batch} sequences of {stage.seq_len} tokens fit no "
            f"split of {world} ranks; take a batch that is a multiple of {world}, or a length that is one of "
            f"{parts * world} ({FILE})"
        )
    small = [cp for cp in fits if stage.seq_len <= parallel.tokens_per_rank * cp]
    return small[0] if small else fits[-1]


@dataclass(frozen=True)
class Shares:
    """How a stage's batch falls onto ranks: dp groups take consecutive sequences, `per` of them per
    forward.
    """

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
            f"curriculum.stages.{stage.name}.batch={stage.batch} sequences cannot be shared by the {dp} "
            f"data-parallel groups of {world} ranks with cp={cp}; {hint} a batch that is a multiple of {dp} "
            f"({file})"
        )
    per_rank = stage.batch // dp
    if engine.micro_batch == "auto":
        per = max(1, min(per_rank, engine.micro_batch_tokens * cp // stage.seq_len))
    else:
        per = engine.micro_batch
        if per < 1 or per_rank % per:
            fit = max(n for n in range(1, per_rank + 1) if per_rank % n == 0 and n <= max(per, 1))
            raise UserError(
                f"engine.micro_batch={per} does not divide the {per_rank} sequences that stage {stage.name} "
                f"gives each of the {dp} data-parallel groups; engine.micro_batch={fit} or auto fits "
                "(configs/engine)"
            )
    return Shares(dp, rank // cp, per_rank, per)
