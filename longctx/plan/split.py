"""How a stage falls onto ranks: context-parallel size, sequences per group and per forward.

Pure arithmetic, so that the planner and every rank of a training run ask the same question.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from longctx.errors import UserError

if TYPE_CHECKING:
    from longctx.config.train import EngineConfig, ParallelConfig
    from longctx.curriculum import Stage

FILE = "configs/parallel and configs/curriculum"


def choose_cp(stage: Stage, parallel: ParallelConfig, world: int) -> int:
    """Ranks that hold one sequence of this stage. Raises UserError for a cp that the world or length refuses.

    auto: the smallest divisor of the world for which a rank holds at most parallel.tokens_per_rank tokens
    of a sequence and the batch divides over the groups; else the largest for which the batch divides. A length that
    cp does not divide is padded by the layout.
    """
    fixed = parallel.stages.get(stage.name, parallel.cp)
    key = f"parallel.stages.{stage.name}" if stage.name in parallel.stages else "parallel.cp"
    if not isinstance(fixed, str):  # a number, not "auto"
        if fixed < 1 or world % fixed:
            near = max(c for c in range(1, world + 1) if world % c == 0 and c <= max(fixed, 1))
            raise UserError(f"{key}={fixed} does not divide the {world} ranks; {near} fits ({FILE})")
        most = max(c for c in range(1, world + 1) if world % c == 0 and _long_enough(stage, c))
        if not _long_enough(stage, fixed):
            raise UserError(
                f"{key}={fixed}: a rank needs 2 tokens of a sequence at least, and curriculum.stages.{stage.name}."
                f"seq_len={stage.seq_len} has fewer than {2 * fixed}; {most} fits ({FILE})"
            )
        return fixed
    fits = [cp for cp in range(1, world + 1) if world % cp == 0 and stage.batch % (world // cp) == 0]
    fits = [cp for cp in fits if _long_enough(stage, cp)]
    if not fits:
        raise UserError(
            f"curriculum.stages.{stage.name}: batch={stage.batch} sequences of {stage.seq_len} tokens fit no "
            f"split of {world} ranks; take a batch that is a multiple of {world}, or a length of {2 * world} tokens or "
            f"more ({FILE})"
        )
    small = [cp for cp in fits if stage.seq_len <= parallel.tokens_per_rank * cp]
    return small[0] if small else fits[-1]


def _long_enough(stage: Stage, cp: int) -> bool:
    """Whether cp ranks can share a sequence: the layout's shortest is two tokens a rank."""
    return cp == 1 or stage.seq_len >= 2 * cp


def tokens_per_rank(stage: Stage, cp: int) -> int:
    """Tokens of one sequence on each of cp ranks, the layout's padding included."""
    multiple = 2 if stage.layout == "zigzag" and cp > 1 else 1
    return -(-stage.seq_len // (cp * multiple)) * multiple


@dataclass(frozen=True)
class Ring:
    """How cp ranks attend: over so many nodes, by which schedule, in groups of how many Ulysses ranks."""

    nodes: int
    schedule: str
    ulysses: int


def choose_ring(
    parallel: ParallelConfig, *, cp: int, local_world: int, stage: str, heads: tuple[int, int] | None = None
) -> Ring:
    """local_world: ranks of a node. heads: (query, kv) heads, None: not looked at.

    auto: a flat ring within a node, a double ring over several, ulysses_ring where parallel.ulysses is above 1; a
    ulysses_ring takes all ranks of a node. Raises UserError for what does not divide.
    """
    if cp == 1:
        return Ring(1, "flat_ring", 1)
    nodes = parallel.nodes
    if isinstance(nodes, str):
        nodes = cp // local_world if cp > local_world and cp % local_world == 0 else 1
    where = f"the {cp} ranks that share a sequence in stage {stage} ({FILE})"
    if nodes < 1 or cp % nodes:
        raise UserError(f"parallel.nodes={nodes} does not divide {where}")
    wanted, schedule = parallel.ulysses, parallel.schedule
    if schedule == "auto":
        several = not isinstance(wanted, str) and wanted > 1
        schedule = "ulysses_ring" if several else ("double_ring" if nodes > 1 else "flat_ring")
    if schedule != "ulysses_ring":
        if wanted not in ("auto", 1):
            raise UserError(
                f"parallel.ulysses={wanted} with parallel.schedule={schedule}: only ulysses_ring exchanges heads; set "
                f"parallel.schedule=ulysses_ring or leave parallel.ulysses at auto ({FILE})"
            )
        return Ring(nodes, schedule, 1)
    h = cp // nodes if isinstance(wanted, str) else wanted
    if h < 1 or (cp // nodes) % h:
        raise UserError(f"parallel.ulysses={h} does not divide the {cp // nodes} ranks of a node among {where}")
    if heads is not None and (heads[0] % h or (heads[1] % h and h % heads[1])):
        raise UserError(
            f"parallel.ulysses={h} cannot share out {heads[0]} query and {heads[1]} kv heads: it must divide the "
            f"first, and of it and the second one must divide the other ({FILE})"
        )
    return Ring(nodes, schedule, h)


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
