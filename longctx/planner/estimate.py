"""Estimates a stage before it runs: its split over ranks, its schedule, memory, flop and seconds per step.

The time of a step is its flop over the configured rate of the device, plus the link time that the simulator finds
exposed in attention, plus the time of ZeRO's transfers that does not overlap with computation. The estimate is good to
tens of percent, enough to choose between settings.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from longctx.config.hardware import HardwareConfig
from longctx.config.plan import PlanConfig
from longctx.curriculum import Stage
from longctx.decide import Decision, Machines, check_cp_by_stage, decide_all, planned_kernel
from longctx.dtype import BYTES
from longctx.planner.memory import NODES_SIMULATED, Memory, need, sizes_of
from longctx.planner.simulate import BACKWARD_WORK, evenly, simulate
from longctx.schedule import SCHEDULES, Sizes, build_all
from longctx.shape import Shape
from longctx.topology import Link, Topology

# The reference kernel writes and reads its fp32 scores about ten times: scale, mask, logsumexp, subtract, exp, product.
REFERENCE_PASSES = 10
Links = tuple[Link, Link]  # the links of one device: inside a node of the schedule, and between nodes


@dataclass(frozen=True)
class AttentionTime:
    """The time of one layer's attention under a schedule, forward and backward: seconds computing, and waiting."""

    schedule: str
    ulysses: int
    computing: float
    exposed: float


@dataclass(frozen=True)
class Estimate:
    """The estimate of one stage.

    flop: floating point operations of all devices in one step. seconds: time of one step. exposed: the part of it spent
    waiting for links. quicker: a schedule that would save at least 5 % of attention's time, or None.
    """

    stage: Stage
    decision: Decision
    tokens_per_rank: int
    attention: AttentionTime
    memory: Memory
    flop: float
    seconds: float
    exposed: float
    quicker: str | None

    @property
    def hours(self) -> float:
        return self.seconds * self.stage.steps / 3600

    @property
    def micro_steps(self) -> int:
        return -(-self.decision.per_group // self.decision.per_forward)


@dataclass(frozen=True)
class Speed:
    """The speed of attention on one device: FLOP/s, and the seconds that memory traffic adds per score."""

    rate: float
    per_score: float = 0.0

    @classmethod
    def of(cls, hardware: HardwareConfig, dtype: str, kernel: str) -> Speed:
        """The speed of a kernel: the reference computes in fp32 or wider and adds passes over its scores."""
        if kernel != "reference":
            return cls(hardware.rate(dtype))
        wide = "float64" if dtype == "float64" else "float32"
        return cls(hardware.rate(wide), REFERENCE_PASSES * BYTES[wide] / (hardware.memory_gbytes * 1e9))


def links_of(decision: Decision, machines: Machines, hardware: HardwareConfig) -> Links:
    """The links of each level of the schedule; a level whose ranks span machines has the network's rate."""
    latency = hardware.latency_us * 1e-6
    near, far = (Link(gbytes * 1e9, latency) for gbytes in (hardware.inner_gbytes, hardware.outer_gbytes))
    sizes = (decision.topology.ranks, decision.cp)
    inner, outer = (near if machines.inside_a_node(size) else far for size in sizes)
    return inner, outer


def block_seconds(topology: Topology, sizes: Sizes, speed: Speed, h: int) -> float:
    """Seconds of one layer's forward on one KV block, for one causal document; h: the Ulysses ranks of a position."""
    whole = sizes.tokens * topology.size
    flop = 2.0 * sizes.batch * sizes.q_heads * sizes.head_dim * whole**2
    scores = sizes.batch * sizes.q_heads * whole**2 / 2
    return (flop / speed.rate + scores * speed.per_score) / topology.size / (topology.size // h)


@lru_cache(maxsize=256)
def time_attention(
    schedule: str, topology: Topology, sizes: Sizes, speed: Speed, links: Links, ulysses: int, forwards: int = 1
) -> AttentionTime:
    """Simulate the attention of one layer, forward and backward, for one causal document.

    At most NODES_SIMULATED nodes are simulated, with blocks of the real size and work; the exposed time is then scaled
    by the number of hops. forwards: forward passes of a step, two under full recomputation.
    """
    h = ulysses if schedule == "ulysses_ring" else 1
    block = block_seconds(topology, sizes, speed, h)
    small = Topology(min(topology.nodes, NODES_SIMULATED), topology.ranks)
    longer = (topology.size / h - 1) / max(1.0, small.size / h - 1)
    computing = exposed = 0.0
    for backward, work, times in ((False, 1.0, forwards), (True, BACKWARD_WORK, 1)):
        schedules = build_all(schedule, small, backward=backward, ulysses=h)
        timeline = simulate(schedules, sizes, evenly(block * work), {"inner": links[0], "outer": links[1]})
        computing += times * block * work * (topology.size // h)
        exposed += times * timeline.exposed() * max(1.0, longer)
    return AttentionTime(schedule, h, computing, exposed)


def quickest(
    topology: Topology, sizes: Sizes, speed: Speed, links: Links, ulysses: int = 0, forwards: int = 1
) -> AttentionTime:
    """The quickest schedule by simulation; of schedules within 1 % of it, the first in SCHEDULES."""
    found: list[AttentionTime] = []
    for schedule in SCHEDULES:
        h = ulysses if ulysses > 1 else topology.ranks
        heads_fit = h > 1 and topology.ranks % h == 0 and sizes.q_heads % h == 0
        kv_fit = sizes.kv_heads % h == 0 or h % sizes.kv_heads == 0
        if schedule == "ulysses_ring" and not (heads_fit and kv_fit):
            continue
        if schedule in ("double_ring", "allgather_ring") and topology.nodes == 1:
            continue
        found.append(time_attention(schedule, topology, sizes, speed, links, h, forwards))
    best = min(item.computing + item.exposed for item in found)
    return next(item for item in found if item.computing + item.exposed <= 1.01 * best)


def estimate_all(stages: list[Stage], shape: Shape, config: PlanConfig) -> list[Estimate]:
    """Estimate every stage; config.model.dtype must be resolved. Raises UserError for what training would refuse."""
    machines = Machines(config.nodes * config.ranks, config.ranks)
    heads = (shape.heads, shape.kv_heads)
    check_cp_by_stage(config.parallel, config.curriculum.stages)
    decisions = decide_all(stages, config.parallel, config.engine, machines, heads, config.model.dtype)
    kernel = planned_kernel(config.hardware.device, config.model, shape, config.hardware.capability)
    return [
        _estimate(stage, shape, config, decision, machines, kernel)
        for stage, decision in zip(stages, decisions, strict=True)
    ]


def _estimate(
    stage: Stage, shape: Shape, config: PlanConfig, decision: Decision, machines: Machines, kernel: str
) -> Estimate:
    hardware, dtype = config.hardware, config.model.dtype
    sizes, links = sizes_of(stage, shape, decision, dtype), links_of(decision, machines, hardware)
    speed, rate = Speed.of(hardware, dtype, kernel), hardware.rate(dtype)
    forwards = 1 if config.model.memory.keep_attention else 2
    attention = time_attention(decision.schedule, decision.topology, sizes, speed, links, decision.ulysses, forwards)
    best = quickest(decision.topology, sizes, speed, links, decision.ulysses, forwards)
    gain = 1 - (best.computing + best.exposed) / (attention.computing + attention.exposed)
    memory = need(stage, shape, config, decision, world=machines.world, kernel=kernel, device=hardware.device)
    tokens = sizes.tokens * decision.per_forward
    products = shape.trained_flops(config.model.memory, BYTES[dtype], tokens).products(tokens)
    micro_steps = -(-decision.per_group // decision.per_forward)
    passes = decision.per_group / decision.per_forward  # the last of them may hold fewer sequences
    computing = passes * (products / rate + shape.layers * attention.computing)
    exposed = passes * shape.layers * attention.exposed
    exposed += _weights_moved(shape, config, BYTES[dtype], micro_steps, computing)
    scored = (5.0 + 2.0 * forwards) * sizes.batch * sizes.q_heads * sizes.head_dim * (stage.seq_len**2 / decision.cp)
    return Estimate(
        stage=stage,
        decision=decision,
        tokens_per_rank=sizes.tokens,
        attention=attention,
        memory=memory,
        flop=passes * (products + shape.layers * scored) * machines.world,
        seconds=computing + exposed,
        exposed=exposed,
        quicker=best.schedule if gain > 0.05 else None,
    )


def _weights_moved(shape: Shape, config: PlanConfig, b: int, micro_steps: int, computing: float) -> float:
    """Seconds by which ZeRO-3's gathers and the gradients' reduction exceed the computation they overlap with.

    Of the three gathers of a micro-step, hpZ (ZeRO++ 2306.10209) takes those of the backward pass from the second copy.
    """
    world, hardware, copy = config.nodes * config.ranks, config.hardware, config.engine.hpz_partition_size
    if world == 1:
        return 0.0
    gbytes = hardware.outer_gbytes if config.nodes > 1 else hardware.inner_gbytes
    gathers = 3 * micro_steps * b if config.engine.zero >= 3 else 0
    from_copy = gathers * 2 / 3 if 1 < copy <= config.ranks else 0
    # Gradients are fp32: sharded ones are reduced at every micro-step, others are all-reduced once a step.
    reduction = 4 * micro_steps if config.engine.zero >= 2 else 2 * 4
    moved = shape.parameters * (gathers - from_copy + reduction) * (world - 1) / world / gbytes
    moved += shape.parameters * from_copy * (copy - 1) / copy / hardware.inner_gbytes
    return max(0.0, moved / 1e9 - computing)
