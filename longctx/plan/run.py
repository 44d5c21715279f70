"""`longctx plan`: a table of the stages a training command would run, or the timeline of a schedule.

Nothing is loaded and nothing is started; a stage that would not fit or not divide is said so here.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from longctx.config.plan import HardwareConfig, PlanConfig
from longctx.console import emit, emit_json, say
from longctx.curriculum import Stage, resolve
from longctx.errors import UserError
from longctx.plan.draw import as_svg, as_text
from longctx.plan.simulate import BACKWARD_WORK, Timeline, evenly, simulate
from longctx.plan.stage import Estimate, estimate, links, topology_of
from longctx.rope import rope_of_model
from longctx.schedule import Sizes, build
from longctx.shape import Shape, shape_of_model
from longctx.topology import Topology

GIB = 2.0**30


def run(config: PlanConfig) -> int:
    """Print what `show` names; exit status 0 also when a stage does not fit (the table says so)."""
    if config.show == "schedule":
        return show_schedule(config)
    shape, stages = _stages(config)
    estimates = [estimate(stage, shape, config) for stage in stages]
    if config.format == "json":
        emit_json(document(config, shape, estimates))
    else:
        emit(table(config, shape, estimates))
    return 0


def _stages(config: PlanConfig) -> tuple[Shape, list[Stage]]:
    shape, rope = shape_of_model(config.model), rope_of_model(config.model)
    file = "configs/curriculum"
    return shape, resolve(
        config.curriculum, head_dim=rope.head_dim, rope=rope.parameters, window=rope.window, file=file
    )


def document(config: PlanConfig, shape: Shape, estimates: list[Estimate]) -> dict[str, Any]:
    """Bytes, flop and seconds per stage."""
    stages = {}
    for item in estimates:
        stages[item.stage.name] = {
            "seq_len": item.stage.seq_len,
            "steps": item.stage.steps,
            "tokens": item.stage.tokens,
            "cp": item.cp,
            "dp": item.dp,
            "micro_steps": item.micro_steps,
            "tokens_per_rank": item.tokens_per_rank,
            "schedule": item.attention.schedule,
            "memory": {**asdict(item.memory), "total": item.memory.total},
            "fits": _fits(config.hardware, item),
            "flop_per_step": item.flop,
            "seconds_per_step": item.seconds,
            "link_seconds_per_step": item.exposed,
            "hours": item.hours,
        }
    return {
        "hardware": asdict(config.hardware),
        "nodes": config.nodes,
        "ranks": config.ranks,
        "parameters": shape.parameters,
        "stages": stages,
        "hours": sum(item.hours for item in estimates),
        "device_hours": sum(item.hours for item in estimates) * config.nodes * config.ranks,
    }


def _fits(hardware: HardwareConfig, item: Estimate) -> bool:
    return item.memory.total <= 0.92 * hardware.memory_gib * GIB


def table(config: PlanConfig, shape: Shape, estimates: list[Estimate]) -> Any:
    """One row per stage, 80 columns; GiB per device."""
    from rich.table import Table

    hardware, world = config.hardware, config.nodes * config.ranks
    title = (
        f"{_count(shape.parameters)} parameters on {config.nodes} x {config.ranks} {hardware.name} at "
        f"{hardware.tflops * hardware.utilization:.3g} TFLOP/s,\n{config.model.dtype}, engine "
        f"{config.engine.name}, ZeRO {config.engine.zero}"
    )
    made = Table(title=title, title_justify="left", box=None, padding=(0, 1, 0, 0))
    for column in ("stage", "schedule"):
        made.add_column(column, no_wrap=True)
    for column in ("cp x dp", "tokens", "owned", "saved", "GiB", "s/step", "links", "steps", "h"):
        made.add_column(column, justify="right", no_wrap=True)
    for item in estimates:
        memory = item.memory
        owned = memory.weights + memory.gradients + memory.optimizer
        made.add_row(
            item.stage.name,
            item.attention.schedule.removesuffix("_ring")
            + (f" {item.attention.ulysses}" if item.attention.ulysses > 1 else ""),
            f"{item.cp} x {item.dp}",
            f"{item.tokens_per_rank}",
            _gib(owned),
            _gib(memory.saved),
            _gib(memory.total) + ("" if _fits(hardware, item) else "!"),
            f"{item.seconds:.3g}",
            f"{item.exposed / item.seconds:.0%}",
            f"{item.stage.steps}",
            f"{item.hours:.2g}",
        )
    hours = sum(item.hours for item in estimates)
    lines = [
        "",
        f"{hours:.3g} hours, {hours * world:.3g} device-hours; tokens and GiB per device (docs/plan.md)",
    ]
    if not all(_fits(hardware, item) for item in estimates):
        lines.append(f"! more than 92 % of {hardware.memory_gib:g} GiB: more ranks, a higher ZeRO or model.memory")
    made.caption, made.caption_justify = "\n".join(lines), "left"
    return made


def _count(number: int) -> str:
    return f"{number / 1e9:.3g}B" if number >= 1e9 else f"{number / 1e6:.3g}M"


def _gib(count: float) -> str:
    return f"{count / GIB:.2f}" if count < 10 * GIB else f"{count / GIB:.1f}"


def show_schedule(config: PlanConfig) -> int:
    """Draw one attention layer's pass as text, and as SVG where a file is named."""
    draw = config.draw
    schedule, topology, sizes, h = _drawn(config)
    if schedule == "ulysses_ring" and (topology.ranks % h or sizes.q_heads % h):
        raise UserError(
            f"draw.ulysses={h} must divide ranks={topology.ranks} and heads={sizes.q_heads} (configs/plan.yaml)"
        )
    if draw.tokens % (2 * topology.size):
        raise UserError(
            f"draw.tokens={draw.tokens} is not divisible by 2 x nodes x ranks = {2 * topology.size} (configs/plan.yaml)"
        )
    timeline = _time(config, schedule, topology, sizes, h)
    title = (
        f"{schedule}, {draw.direction}, {topology.nodes} nodes x {topology.ranks} ranks, "
        f"{sizes.tokens} tokens per rank on {config.hardware.name}"
    )
    shown = list(range(min(draw.show_ranks, topology.size)))
    if draw.svg:
        Path(draw.svg).write_text(as_svg(timeline, title, nodes=topology.nodes, ranks=shown))
        say(f"wrote {draw.svg}")
    if config.format == "json":
        spans = [asdict(span) for span in timeline.spans]
        emit_json({"schedule": schedule, "seconds": timeline.seconds, "exposed": timeline.exposed(), "spans": spans})
    else:
        print(title)
        print(as_text(timeline, width=draw.width, ranks=shown))
        print(f"{'':8}  waiting for links: {timeline.exposed() / timeline.seconds:.0%} of the time")
    return 0


def _drawn(config: PlanConfig) -> tuple[str, Topology, Sizes, int]:
    """Schedule, topology, sizes and Ulysses size of what is drawn."""
    draw = config.draw
    if draw.stage is None:
        topology = Topology(config.nodes, config.ranks)
        sizes = Sizes(draw.tokens // topology.size, draw.heads, draw.kv_heads, draw.head_dim)
        return draw.schedule, topology, sizes, draw.ulysses or config.ranks
    shape, stages = _stages(config)
    stage = next((item for item in stages if item.name == draw.stage), None)
    if stage is None:
        known = ", ".join(item.name for item in stages)
        raise UserError(f"draw.stage={draw.stage} is no stage of the curriculum; known: {known} (configs/plan.yaml)")
    planned = estimate(stage, shape, config)
    sizes = Sizes(planned.tokens_per_rank, shape.heads, shape.kv_heads, shape.head_dim)
    topology = topology_of(planned.cp, config.ranks)
    return planned.attention.schedule, topology, sizes, planned.attention.ulysses


def _time(config: PlanConfig, schedule: str, topology: Topology, sizes: Sizes, h: int) -> Timeline:
    backward = config.draw.direction == "backward"
    schedules = [build(schedule, topology, r, backward=backward, ulysses=h) for r in range(topology.size)]
    rate = config.hardware.tflops * 1e12 * config.hardware.utilization
    blocks = topology.size // schedules[0].ulysses
    flop = 2.0 * sizes.q_heads * sizes.head_dim * float(sizes.tokens * topology.size) ** 2
    block = flop / topology.size / blocks / rate * (BACKWARD_WORK if backward else 1.0)
    return simulate(schedules, sizes, evenly(block), links(config.hardware))
