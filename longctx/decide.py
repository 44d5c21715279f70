"""How a stage falls onto ranks: the one place that decides cp, nodes, schedule, Ulysses ranks and micro-batch.

`longctx plan`, the checks before a run starts and every rank of it ask the same functions, so that what is planned
is what runs. Pure arithmetic: no processes, no torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from longctx.errors import UserError
from longctx.topology import Topology

if TYPE_CHECKING:
    from longctx.config.train import EngineConfig, ParallelConfig
    from longctx.curriculum import Stage

FILE = "configs/parallel and configs/curriculum"
CUDA_KERNELS = ("flash_attn_3", "flash_attn_2", "cudnn", "torch_flash")
REFERENCE = "reference"


@dataclass(frozen=True)
class Machines:
    """The ranks of a run: `world` of them, `ranks_per_node` on each node."""

    world: int
    ranks_per_node: int

    def inside_a_node(self, neighbours: int) -> bool:
        """Whether every group of so many neighbouring ranks lies within one node."""
        return neighbours <= self.ranks_per_node and self.ranks_per_node % neighbours == 0


@dataclass(frozen=True)
class Decision:
    """One stage on its ranks.

    cp: ranks that share a sequence; dp = world / cp groups hold different ones. nodes, schedule, ulysses: how the cp
    ranks attend. per_group: sequences of a data-parallel group per step; per_forward: of them in one forward pass.
    """

    cp: int
    dp: int
    nodes: int
    schedule: str
    ulysses: int
    per_group: int
    per_forward: int

    @property
    def topology(self) -> Topology:
        """The cp ranks as the schedule sees them."""
        return Topology(self.nodes, self.cp // self.nodes)


def decide(
    stage: Stage, parallel: ParallelConfig, engine: EngineConfig, machines: Machines, heads: tuple[int, int]
) -> Decision:
    """heads: the model's (query, kv) heads. Raises UserError for what the world, batch, length or heads refuse."""
    cp = choose_cp(stage, parallel, machines.world)
    share = shares(stage, engine, world=machines.world, cp=cp, rank=0, file=FILE)
    ring = choose_schedule(parallel, cp=cp, local_world=machines.ranks_per_node, stage=stage.name, heads=heads)
    return Decision(cp, share.dp, ring.nodes, ring.schedule, ring.ulysses, share.per_rank, share.per)


def decide_all(
    stages: Iterable[Stage],
    parallel: ParallelConfig,
    engine: EngineConfig,
    machines: Machines,
    heads: tuple[int, int],
    dtype: str,
) -> list[Decision]:
    """`decide` for every stage; also refuses an engine's contradictions and cp of a stage that does not exist."""
    stages = list(stages)
    check_engine(engine, dtype)
    names = [stage.name for stage in stages]
    for name in parallel.stages:
        if name not in names:
            raise UserError(f"parallel.stages.{name} is no stage of the curriculum; known: {', '.join(names)} ({FILE})")
    return [decide(stage, parallel, engine, machines, heads) for stage in stages]


def check_engine(config: EngineConfig, dtype: str) -> None:
    """Raises UserError for what the chosen engine cannot do. dtype: of the weights."""
    where = "configs/engine"
    if config.name == "deepspeed" and dtype == "float64":
        raise UserError("model.dtype=float64 is not something DeepSpeed trains; use engine=ddp (configs/model)")
    if config.name == "deepspeed" and dtype == "bfloat16" and config.zero == 1:
        raise UserError(
            "engine.zero=1 with model.dtype=bfloat16: DeepSpeed takes another optimizer there, whose state checkpoints "
            f"cannot hold; use engine.zero=2, which also holds less memory ({where}/deepspeed.yaml)"
        )
    if config.name == "ddp" and config.zero:
        raise UserError(f"engine.zero={config.zero} is not something engine=ddp can do, it replicates "
                        f"everything; use engine=deepspeed or engine.zero=0 ({where}/ddp.yaml)")  # fmt: skip
    if config.name == "deepspeed" and not config.zero:
        raise UserError("engine.zero=0 shards nothing, which is engine=ddp; choose engine.zero=1, 2 or 3 "
                        f"({where}/deepspeed.yaml)")  # fmt: skip
    if config.name == "ddp" and (config.offload_optimizer or config.offload_parameters):
        raise UserError(f"engine.offload_* needs engine=deepspeed ({where}/ddp.yaml)")
    if config.offload_parameters and config.zero != 3:
        raise UserError(
            f"engine.offload_parameters=true needs engine.zero=3, not {config.zero} ({where}/deepspeed.yaml)"
        )
    if config.secondary_partition != 1 and config.zero != 3:
        raise UserError(f"engine.secondary_partition={config.secondary_partition} (hpZ) needs engine.zero=3 "
                        f"({where}/deepspeed.yaml)")  # fmt: skip


def choose_cp(stage: Stage, parallel: ParallelConfig, world: int) -> int:
    """Ranks that hold one sequence of this stage. Raises UserError for a cp that the world or length refuses.

    auto: the smallest divisor of the world for which a rank holds at most parallel.tokens_per_rank tokens
    of a sequence and the batch divides over the groups; else the largest for which the batch divides. The layout pads
    a length that cp does not divide.
    """
    fixed = parallel.stages.get(stage.name, parallel.cp)
    key = f"parallel.stages.{stage.name}" if stage.name in parallel.stages else "parallel.cp"
    if not isinstance(fixed, str):  # a number, not "auto"
        if fixed < 1 or world % fixed:
            near = max(c for c in range(1, world + 1) if world % c == 0 and c <= max(fixed, 1))
            raise UserError(f"{key}={fixed} does not divide the {world} ranks; {near} fits ({FILE})")
        if not _long_enough(stage, fixed):
            most = max(c for c in range(1, world + 1) if world % c == 0 and _long_enough(stage, c))
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
class ScheduleChoice:
    """How cp ranks attend: over so many nodes, by which schedule, in groups of how many Ulysses ranks."""

    nodes: int
    schedule: str
    ulysses: int


def choose_schedule(
    parallel: ParallelConfig, *, cp: int, local_world: int, stage: str, heads: tuple[int, int] | None = None
) -> ScheduleChoice:
    """local_world: ranks of a node. heads: (query, kv) heads, None: not looked at.

    auto: a flat ring within a node, a double ring over several, ulysses_ring where parallel.ulysses is above 1; a
    ulysses_ring takes all ranks of a node. Raises UserError for what does not divide.
    """
    if cp == 1:
        return ScheduleChoice(1, "flat_ring", 1)
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
        return ScheduleChoice(nodes, schedule, 1)
    h = cp // nodes if isinstance(wanted, str) else wanted
    if h < 1 or (cp // nodes) % h:
        raise UserError(f"parallel.ulysses={h} does not divide the {cp // nodes} ranks of a node among {where}")
    if heads is not None and (heads[0] % h or (heads[1] % h and h % heads[1])):
        raise UserError(
            f"parallel.ulysses={h} cannot share out {heads[0]} query and {heads[1]} kv heads: it must divide the "
            f"first, and of it and the second one must divide the other ({FILE})"
        )
    return ScheduleChoice(nodes, schedule, h)


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


def assumed_kernels(device: str, dtype: str, head_dim: int) -> dict[str, list[str]]:
    """Why each attention kernel cannot serve on a machine that is only planned, where every package is installed."""
    fast = []
    if dtype != "bfloat16":
        fast.append(f"needs fp16 or bf16, got {dtype}")
    if head_dim % 8 or head_dim > 256:
        fast.append(f"needs a head dimension that is a multiple of 8 up to 256, got {head_dim}")
    found = {name: list(fast) if device == "cuda" else [f"needs CUDA tensors, got {device}"] for name in CUDA_KERNELS}
    found["torch_cpu"] = [] if device == "cpu" else [f"needs CPU tensors, got {device}"]
    return {**found, REFERENCE: []}


def choose_kernel(device: str, dtype: str, serving: Mapping[str, Sequence[str]], wanted: str) -> str:
    """The attention kernel of a run: `wanted`, or for auto the first that serves.

    device: cuda or cpu. serving: kernels in order of preference with the reasons why each cannot serve (none: it can).
    Raises UserError for a named kernel that cannot serve, and on a GPU for auto where only the reference is left.
    """
    if wanted != "auto":
        if reasons := serving[wanted]:
            able = ", ".join(name for name, why in serving.items() if not why)
            raise UserError(
                f"model.attention_kernel={wanted} cannot serve model.dtype={dtype} on {device}: {'; '.join(reasons)}; "
                f"take one of auto, {able} (configs/model)"
            )
        return wanted
    chosen = next(name for name, why in serving.items() if not why)
    if device == "cuda" and chosen == REFERENCE:
        why = "; ".join(dict.fromkeys(reason for name in CUDA_KERNELS for reason in serving.get(name, ())))
        raise UserError(
            f"model.dtype={dtype}: no fast attention kernel serves it on a GPU ({why}), and the reference kernel forms "
            "every score in memory, tens of times slower. Take model.dtype=bfloat16 (its masters are fp32), train on "
            "the CPU with engine.device=cpu, or ask for it with model.attention_kernel=reference (configs/model)"
        )
    return chosen
