"""Decides how a stage runs on its ranks: cp, nodes, schedule, Ulysses ranks, micro-batch, kernel, block sizes.

`longctx plan`, the checks before a run and every rank of the run call the same functions, so that a run does what was
planned. The module is pure arithmetic, without processes and without torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

from longctx.errors import UserError
from longctx.topology import Topology

if TYPE_CHECKING:
    from longctx.config.model import MemoryConfig, ModelConfig
    from longctx.config.train import EngineConfig, ParallelConfig
    from longctx.curriculum import Stage
    from longctx.shape import Shape

FILE = "configs/parallel and configs/curriculum"
CUDA_KERNELS = ("flash_attn_3", "flash_attn_4", "cudnn", "flash_attn_2", "torch_flash")
REFERENCE = "reference"


class Blocks(NamedTuple):
    """Tokens that go through the feed-forward block at once (0: all), and tokens whose logits exist at once."""

    ffn_block: int
    loss_chunk: int


# Sizes that stay in a CPU's caches, and sizes that fill a GPU (docs/benchmarks.md).
BLOCKS = {"cpu": Blocks(2048, 512), "cuda": Blocks(8192, 4096)}


@dataclass(frozen=True)
class Machines:
    """The `world` ranks of a run, with `ranks_per_node` on each node."""

    world: int
    ranks_per_node: int

    def inside_a_node(self, neighbours: int) -> bool:
        """Whether every group of `neighbours` consecutive ranks lies within one node."""
        return neighbours <= self.ranks_per_node and self.ranks_per_node % neighbours == 0


@dataclass(frozen=True)
class Decision:
    """How one stage runs on its ranks.

    cp ranks share a sequence, and dp = world / cp groups hold different sequences. nodes, schedule and ulysses say how
    the cp ranks attend. Each group trains per_group sequences in a step and per_forward sequences in a forward pass.
    """

    cp: int
    dp: int
    nodes: int
    schedule: str
    ulysses: int
    per_group: int
    per_forward: int

    def shares(self, rank: int) -> Shares:
        """The share of a rank of the world in the stage's batch."""
        return Shares(self.dp, rank // self.cp, self.per_group, self.per_forward)

    @property
    def topology(self) -> Topology:
        """The nodes of the cp ranks, and the ranks on each, as the schedule takes them."""
        return Topology(self.nodes, self.cp // self.nodes)


def decide(
    stage: Stage, parallel: ParallelConfig, engine: EngineConfig, machines: Machines, heads: tuple[int, int]
) -> Decision:
    """Decide how one stage runs.

    heads: the model's (query, kv) heads. Raises UserError when the world, the batch, the length or the heads do not
    allow what the config asks for.
    """
    cp = choose_cp(stage, parallel, machines.world)
    dp, per_group, per_forward = divide_batch(stage, engine, world=machines.world, cp=cp)
    ring = choose_schedule(parallel, cp=cp, local_world=machines.ranks_per_node, stage=stage.name, heads=heads)
    return Decision(cp, dp, ring.nodes, ring.schedule, ring.ulysses, per_group, per_forward)


def decide_all(
    stages: Iterable[Stage],
    parallel: ParallelConfig,
    engine: EngineConfig,
    machines: Machines,
    heads: tuple[int, int],
    dtype: str,
) -> list[Decision]:
    """Decide how these stages run, which need not be all of the curriculum; also refuses a contradictory engine."""
    stages = list(stages)
    check_engine(engine, dtype)
    sharing, world = engine.hpz_partition_size, machines.world
    if world % min(sharing, world):
        near = max(size for size in divisors(world) if size <= sharing)
        raise UserError(
            f"engine.hpz_partition_size={sharing} does not divide the {world} ranks; {near} fits "
            "(configs/engine/deepspeed.yaml)"
        )
    decisions = [decide(stage, parallel, engine, machines, heads) for stage in stages]
    if engine.offload_optimizer and engine.zero in (1, 2) and dtype == "bfloat16":
        for stage, decision in zip(stages, decisions, strict=True):
            check_sums(stage, decision, engine)
    return decisions


def check_cp_by_stage(parallel: ParallelConfig, known: Iterable[str]) -> None:
    """Refuse a cp for a stage that the curriculum does not have; known: its stages, those left out by `only` too."""
    known = list(known)
    for name in parallel.cp_by_stage:
        if name not in known:
            raise UserError(
                f"parallel.cp_by_stage.{name} is no stage of the curriculum; known: {', '.join(known)} ({FILE})"
            )


def check_sums(stage: Stage, decision: Decision, engine: EngineConfig) -> None:
    """Refuse several micro-batches a step under ZeRO-1 and 2 whose optimizer is offloaded and weights are bfloat16.

    DeepSpeed (0.18, 0.19) adds the gradients up on the host in the weights' dtype there, so each micro-batch rounds the
    sum to bfloat16.
    """
    if decision.per_group > decision.per_forward:
        raise UserError(
            f"engine.zero={engine.zero} with engine.offload_optimizer=true and bfloat16 weights: stage {stage.name} "
            f"takes {decision.per_group} sequences a step in micro-batches of {decision.per_forward}, whose gradients "
            "DeepSpeed adds up in bfloat16 there. Use engine.zero=3, which adds in float32, or one micro-batch a "
            "step: engine.micro_batch, more ranks or a smaller batch (configs/engine/deepspeed.yaml)"
        )


def check_engine(config: EngineConfig, dtype: str) -> None:
    """Raise UserError when the chosen engine cannot do what the config asks. dtype: the weights' dtype."""
    where = "configs/engine"
    if config.name == "deepspeed" and dtype == "float64":
        raise UserError("model.dtype=float64 is not something DeepSpeed trains; use engine=ddp (configs/model)")
    if config.name == "deepspeed" and dtype == "bfloat16" and config.zero == 1:
        raise UserError(
            "engine.zero=1 with model.dtype=bfloat16: DeepSpeed takes another optimizer there, whose state checkpoints "
            f"cannot hold; use engine.zero=2, which also holds less memory ({where}/deepspeed.yaml)"
        )
    if config.name == "ddp" and config.zero:
        raise UserError(
            f"engine.zero={config.zero} is not something engine=ddp can do, it replicates everything; use "
            f"engine=deepspeed or engine.zero=0 ({where}/ddp.yaml)"
        )
    if config.name == "deepspeed" and not config.zero:
        raise UserError(
            f"engine.zero=0 shards nothing, which is engine=ddp; choose engine.zero=1, 2 or 3 ({where}/deepspeed.yaml)"
        )
    if config.offload_ratio != 1 and not config.offload_optimizer:
        raise UserError(
            f"engine.offload_ratio={config.offload_ratio:g} is a share of what engine.offload_optimizer=true keeps in "
            f"host memory; set that too, or leave the ratio at 1 ({where})"
        )
    if config.offload_ratio != 1 and config.name == "deepspeed":
        raise UserError(
            f"engine.offload_ratio={config.offload_ratio:g} with engine=deepspeed: DeepSpeed's own partial offload "
            "keeps 4 more bytes of every weight on the host and leaves the learning rate of the device's part at 0; "
            f"use engine=ddp engine.zero=0, or engine.offload_ratio=1 ({where}/deepspeed.yaml)"
        )
    if config.name == "ddp" and config.offload_parameters:
        raise UserError(f"engine.offload_parameters=true needs engine=deepspeed ({where}/ddp.yaml)")
    if config.offload_parameters and config.zero != 3:
        raise UserError(
            f"engine.offload_parameters=true needs engine.zero=3, not {config.zero} ({where}/deepspeed.yaml)"
        )
    if config.hpz_partition_size != 1 and config.zero != 3:
        raise UserError(
            f"engine.hpz_partition_size={config.hpz_partition_size} (hpZ) needs engine.zero=3 ({where}/deepspeed.yaml)"
        )


def choose_cp(stage: Stage, parallel: ParallelConfig, world: int) -> int:
    """The number of ranks that hold one sequence of this stage.

    auto takes the smallest divisor of the world for which a rank holds at most parallel.seq_len_per_rank tokens of a
    sequence and the groups divide the batch; if there is none, it takes the largest divisor whose groups divide the
    batch. The layout pads a length that cp does not divide. Raises UserError when cp does not divide the world or
    leaves a rank fewer than two tokens.
    """
    fixed = parallel.cp_by_stage.get(stage.name, parallel.cp)
    fixed = world if fixed == "all" else fixed
    key = f"parallel.cp_by_stage.{stage.name}" if stage.name in parallel.cp_by_stage else "parallel.cp"
    if not isinstance(fixed, str):  # a number, not "auto"
        if world % fixed:
            near = max(c for c in divisors(world) if c <= fixed)
            raise UserError(f"{key}={fixed} does not divide the {world} ranks; {near} fits ({FILE})")
        if not _long_enough(stage, fixed):
            most = max(c for c in divisors(world) if _long_enough(stage, c))
            raise UserError(
                f"{key}={fixed}: a rank needs 2 tokens of a sequence at least, and curriculum.stages.{stage.name}."
                f"seq_len={stage.seq_len} has fewer than {2 * fixed}; {most} fits ({FILE})"
            )
        return fixed
    fits = [cp for cp in divisors(world) if stage.batch % (world // cp) == 0 and _long_enough(stage, cp)]
    if not fits:
        raise UserError(
            f"curriculum.stages.{stage.name}: batch={stage.batch} sequences of {stage.seq_len} tokens fit no split of "
            f"{world} ranks; take a batch that is a multiple of {world}, or a length of {2 * world} tokens or more "
            f"({FILE})"
        )
    small = [cp for cp in fits if stage.seq_len <= parallel.seq_len_per_rank * cp]
    return small[0] if small else fits[-1]


def divisors(number: int) -> list[int]:
    """The divisors of a whole number, in order."""
    low = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return low + [number // d for d in reversed(low) if d * d != number]


def _long_enough(stage: Stage, cp: int) -> bool:
    """Whether cp ranks can share a sequence: the layout needs two tokens on each rank."""
    return cp == 1 or stage.seq_len >= 2 * cp


def tokens_per_rank(stage: Stage, cp: int) -> int:
    """Tokens of one sequence on each of cp ranks, including the layout's padding."""
    multiple = 2 if stage.layout == "zigzag" and cp > 1 else 1
    return -(-stage.seq_len // (cp * multiple)) * multiple


@dataclass(frozen=True)
class ScheduleChoice:
    """How cp ranks attend: the number of nodes, the schedule, and the number of ranks that split heads."""

    nodes: int
    schedule: str
    ulysses: int


def choose_schedule(
    parallel: ParallelConfig, *, cp: int, local_world: int, stage: str, heads: tuple[int, int] | None = None
) -> ScheduleChoice:
    """Choose the schedule of the cp ranks.

    local_world: ranks of a node. heads: (query, kv) heads, or None to leave them unchecked. auto takes a flat ring
    within a node, a double ring over several nodes, and ulysses_ring where parallel.ulysses is above 1; with
    parallel.ulysses=auto a ulysses_ring takes all ranks of a node. Raises UserError when nodes, ranks or heads do not
    divide.
    """
    if cp == 1:
        return ScheduleChoice(1, "flat_ring", 1)
    nodes = parallel.nodes
    if isinstance(nodes, str):
        nodes = cp // local_world if cp > local_world and cp % local_world == 0 else 1
    where = f"the {cp} ranks that share a sequence in stage {stage} ({FILE})"
    if cp % nodes:
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
    if (cp // nodes) % h:
        raise UserError(f"parallel.ulysses={h} does not divide the {cp // nodes} ranks of a node among {where}")
    if heads is not None and (heads[0] % h or (heads[1] % h and h % heads[1])):
        raise UserError(
            f"parallel.ulysses={h} cannot share out {heads[0]} query and {heads[1]} kv heads: it must divide the "
            f"first, and of it and the second one must divide the other ({FILE})"
        )
    return ScheduleChoice(nodes, schedule, h)


def ring_words(decision: Decision, machines: Machines) -> str:
    """The schedule of a stage and the link that each of its rings uses, in words."""

    def link(neighbours: int) -> str:
        ranks = f"{neighbours} rank{'s' * (neighbours > 1)}"
        return f"{ranks} inside a node" if machines.inside_a_node(neighbours) else f"{ranks} between nodes"

    cp, nodes = decision.cp, decision.nodes
    if cp == 1:
        return "no ring"
    if nodes == 1:
        return f"{decision.schedule} of {link(cp)}"
    outer = "inside a node" if machines.inside_a_node(cp) else "between nodes"
    return f"{decision.schedule}, inner ring of {link(cp // nodes)}, outer ring of {nodes} {outer}"


@dataclass(frozen=True)
class Shares:
    """How ranks share a stage's batch: dp groups take per_group consecutive sequences each, per_forward at a time."""

    dp: int
    dp_rank: int
    per_group: int
    per_forward: int

    def sequences(self, cursor: int) -> list[list[int]]:
        """Indices of this rank's sequences in the step that begins at the global `cursor`, one list per micro-batch."""
        first = cursor + self.dp_rank * self.per_group
        mine = list(range(first, first + self.per_group))
        return [mine[at : at + self.per_forward] for at in range(0, len(mine), self.per_forward)]


def divide_batch(stage: Stage, engine: EngineConfig, *, world: int, cp: int) -> tuple[int, int, int]:
    """Divide a stage's batch: the data-parallel groups, and the sequences of each group in a step and in a forward.

    Raises UserError when the groups do not divide the batch, or the micro-batch does not divide a group's sequences.
    """
    dp = world // cp
    if stage.batch % dp:
        fits = [c for c in divisors(world) if c >= cp and stage.batch % (world // c) == 0]
        hint = f"parallel.cp={fits[0]} fits, or" if fits else "take"
        raise UserError(
            f"curriculum.stages.{stage.name}.batch={stage.batch} sequences cannot be shared by the {dp} data-parallel "
            f"groups of {world} ranks with cp={cp}; {hint} a batch that is a multiple of {dp} ({FILE})"
        )
    per_group = stage.batch // dp
    if engine.micro_batch == "auto":
        return dp, per_group, max(1, min(per_group, engine.micro_batch_tokens * cp // stage.seq_len))
    if per_group % engine.micro_batch:
        fit = max(n for n in divisors(per_group) if n <= engine.micro_batch)
        raise UserError(
            f"engine.micro_batch={engine.micro_batch} does not divide the {per_group} sequences that stage "
            f"{stage.name} gives each of the {dp} data-parallel groups; engine.micro_batch={fit} or auto fits "
            "(configs/engine)"
        )
    return dp, per_group, engine.micro_batch


def blocks_of(memory: MemoryConfig, device: str) -> Blocks:
    """The block sizes of a model on a device (cuda or cpu): those of the config, and for auto those of the device."""
    usual = BLOCKS["cpu" if device == "cpu" else "cuda"]
    return Blocks(
        usual.ffn_block if memory.ffn_block == "auto" else memory.ffn_block,
        usual.loss_chunk if memory.loss_chunk == "auto" else memory.loss_chunk,
    )


def with_blocks(model: ModelConfig, device: str) -> ModelConfig:
    """The config with model.memory's auto sizes in numbers."""
    return replace(model, memory=replace(model.memory, **blocks_of(model.memory, device)._asdict()))


def assumed_kernels(device: str, dtype: str, head_dim: int, capability: float = 9.0) -> dict[str, list[str]]:
    """The reasons why each attention kernel cannot serve on a planned machine, if every package is installed there."""
    fast = []
    if dtype != "bfloat16":
        fast.append(f"needs fp16 or bf16, got {dtype}")
    if head_dim % 8 or head_dim > 256:
        fast.append(f"needs a head dimension that is a multiple of 8 up to 256, got {head_dim}")
    found = {name: list(fast) if device == "cuda" else [f"needs CUDA tensors, got {device}"] for name in CUDA_KERNELS}
    for name, other in (("flash_attn_3", not 9 <= capability < 10), ("flash_attn_4", capability < 9)):
        if device == "cuda" and other:  # as longctx.attention.flash_attn says on such a device
            found[name].append(f"is built for newer or other GPUs, got compute capability {capability:g}")
    found["torch_cpu"] = [] if device == "cpu" else [f"needs CPU tensors, got {device}"]
    return {**found, REFERENCE: []}


def choose_kernel(device: str, dtype: str, serving: Mapping[str, Sequence[str]], wanted: str) -> str:
    """The attention kernel of a run: `wanted`, or under auto the first that can serve.

    device: cuda or cpu. serving: the kernels in order of preference, each with the reasons why it cannot serve; an
    empty list means that it can. Raises UserError when the named kernel cannot serve, and when auto finds only the
    reference kernel on a GPU.
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


def planned_kernel(device: str, model: ModelConfig, shape: Shape, capability: float = 9.0) -> str:
    """The attention kernel on a device that is not at hand. Raises UserError if training there would refuse it."""
    serving = assumed_kernels(device, model.dtype, shape.head_dim, capability)
    return choose_kernel(device, model.dtype, serving, model.attention_kernel)
