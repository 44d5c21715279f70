"""A stage in numbers before it runs: its split over ranks, its schedule, memory, flop and seconds of one
step.

Time is flop over the rate that the device is said to reach, plus the link time the simulator finds exposed in
attention, plus what ZeRO moves when it cannot hide. An estimate to choose by, within tens of percent.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from longctx.config.plan import HardwareConfig, PlanConfig
from longctx.curriculum import Stage
from longctx.plan.memory import BYTES, Memory, ring_buffers, stage_memory
from longctx.plan.shape import Shape
from longctx.plan.simulate import BACKWARD_WORK, evenly, simulate
from longctx.plan.split import choose_cp, choose_ring, shares, tokens_per_rank
from longctx.schedule import SCHEDULES, Plan, Sizes, build
from longctx.topology import Link, Topology

NODES_SIMULATED = 4


@dataclass(frozen=True)
class Attention:
    """One layer's attention of one forward on one schedule: seconds computing and seconds waiting for
    links.
    """

    schedule: str
    ulysses: int
    computing: float
    exposed: float
    buffers: float


@dataclass(frozen=True)
class Estimate:
    """One stage. flop: executed per step by all devices. seconds: one optimizer step; exposed: of it on
    links.
    """

    stage: Stage
    cp: int
    dp: int
    micro_steps: int
    tokens_per_rank: int
    attention: Attention
    memory: Memory
    flop: float
    seconds: float
    exposed: float

    @property
    def hours(self) -> float:
        return self.seconds * self.stage.steps / 3600


def links(hardware: HardwareConfig) -> dict:
    """One device's link per level."""
    latency = hardware.latency_us * 1e-6
    return {
        "inner": Link(hardware.inner_gbytes * 1e9, latency),
        "outer": Link(hardware.outer_gbytes * 1e9, latency),
    }


def topology_of(cp: int, ranks: int) -> Topology:
    """Nodes and ranks per node that `cp` neighbouring ranks span."""
    return Topology(1, cp) if cp <= ranks else Topology(cp // ranks, ranks)


@lru_cache(maxsize=256)
def time_attention(
    schedule: str, topology: Topology, sizes: Sizes, hardware: HardwareConfig, ulysses: int
) -> Attention:
    """Simulate one layer, forward and backward, of one causal document.

    Beyond NODES_SIMULATED nodes so many stand for all, with blocks of true size and work: a ring's exposed
    time grows with its hops, and its buffers do not grow.
    """
    rate = hardware.tflops * 1e12 * hardware.utilization
    h = ulysses if schedule == "ulysses_ring" else 1
    whole = sizes.tokens * topology.size
    flop = 2.0 * sizes.batch * sizes.q_heads * sizes.head_dim * whole**2
    block = flop / topology.size / (topology.size // h) / rate
    small = Topology(min(topology.nodes, NODES_SIMULATED), topology.ranks)
    longer = (topology.size / h - 1) / max(1.0, small.size / h - 1)
    computing = exposed = 0.0
    everyone: list[list[Plan]] = []
    for backward, work in ((False, 1.0), (True, BACKWARD_WORK)):
        plans = [build(schedule, small, r, backward=backward, ulysses=h) for r in range(small.size)]
        timeline = simulate(plans, sizes, evenly(block * work), links(hardware))
        computing += block * work * (topology.size // h)
        exposed += timeline.exposed() * max(1.0, longer)
        everyone.append(plans)
    buffers = max(ring_buffers(plans, sizes) for plans in zip(*everyone, strict=True))
    return Attention(schedule, h, computing, exposed, buffers)


def choose_schedule(topology: Topology, sizes: Sizes, hardware: HardwareConfig, ulysses: int = 0) -> Attention:
    """The quickest schedule by simulation; the earlier of SCHEDULES where two differ by less than 1 %."""
    found: list[Attention] = []
    for schedule in SCHEDULES:
        h = ulysses if ulysses > 1 else topology.ranks
        heads_fit = h > 1 and topology.ranks % h == 0 and sizes.q_heads % h == 0
        kv_fit = sizes.kv_heads % h == 0 or h % sizes.kv_heads == 0
        if schedule == "ulysses_ring" and not (heads_fit and kv_fit):
            continue
        if schedule in ("double_ring", "allgather_ring") and topology.nodes == 1:
            continue
        found.append(time_attention(schedule, topology, sizes, hardware, h))
    best = min(item.computing + item.exposed for item in found)
    return next(item for item in found if item.computing + item.exposed <= 1.01 * best)


def estimate(stage: Stage, shape: Shape, config: PlanConfig) -> Estimate:
    """Raises UserError where training would refuse the split."""
    world = config.nodes * config.ranks
    cp = choose_cp(stage, config.parallel, world)
    share = shares(stage, config.engine, world=world, cp=cp, rank=0, file="configs/parallel")
    b = BYTES[config.model.dtype]
    sizes = Sizes(tokens_per_rank(stage, cp), shape.heads, shape.kv_heads, shape.head_dim, share.per, b, max(b, 4))
    topology = topology_of(cp, config.ranks)
    heads = (shape.heads, shape.kv_heads)
    ring = choose_ring(config.parallel, cp=cp, local_world=config.ranks, stage=stage.name, heads=heads)
    if config.parallel.schedule == "auto":
        attention = choose_schedule(topology, sizes, config.hardware, ring.ulysses)
    else:
        attention = time_attention(ring.schedule, topology, sizes, config.hardware, ring.ulysses)
    tokens = sizes.tokens * share.per
    engine, rate = config.engine, config.hardware.tflops * 1e12 * config.hardware.utilization
    memory = stage_memory(
        shape,
        config.model.memory,
        tokens=tokens,
        dtype=config.model.dtype,
        zero=engine.zero,
        world=world,
        ring=attention.buffers,
        offload_optimizer=engine.offload_optimizer,
        offload_parameters=engine.offload_parameters,
    )
    passes = 8 if config.model.memory.checkpoint else 6  # with checkpoints every product runs forward once more
    products = passes * shape.layers * shape.layer_weights + 6 * shape.vocab * shape.hidden
    micro_steps = -(-share.per_rank // share.per)
    one = tokens * products / rate + shape.layers * attention.computing
    exposed = micro_steps * shape.layers * attention.exposed
    exposed += _weights_moved(shape, config, b, micro_steps, micro_steps * one)
    return Estimate(
        stage=stage,
        cp=cp,
        dp=share.dp,
        micro_steps=micro_steps,
        tokens_per_rank=sizes.tokens,
        attention=attention,
        memory=memory,
        flop=micro_steps * one * rate * world,
        seconds=micro_steps * one + exposed,
        exposed=exposed,
    )


def _weights_moved(shape: Shape, config: PlanConfig, b: int, micro_steps: int, computing: float) -> float:
    """Seconds by which ZeRO-3's gathers and the gradients' reduction outlast the computation they hide
    behind.
    """
    world = config.nodes * config.ranks
    if world == 1:
        return 0.0
    gbytes = config.hardware.outer_gbytes if config.nodes > 1 else config.hardware.inner_gbytes
    gathers = 3 * micro_steps * b if config.engine.zero >= 3 else 0
    # fp32 gradients: scattered at every micro-step when they are sharded, else all-reduced once
    reduction = 4 * micro_steps if config.engine.zero >= 2 else 2 * 4
    moved = shape.parameters * (gathers + reduction) * (world - 1) / world
    return max(0.0, moved / (gbytes * 1e9) - computing)
