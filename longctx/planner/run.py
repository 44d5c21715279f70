"""The verb plan: prints a table of the stages that a training command would run, or the timeline of a schedule.

It loads no model and starts no ranks. It marks stages that do not fit, and refuses stages that do not divide.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

from longctx import dtype as dtypes
from longctx.assets import config_folder
from longctx.config.plan import PlanConfig
from longctx.console import emit, emit_json, escape, say
from longctx.curriculum import Stage, resolve
from longctx.decide import Machines, planned_kernel
from longctx.errors import UserError
from longctx.planner.draw import as_svg, as_text
from longctx.planner.estimate import Estimate, Links, Speed, block_seconds, estimate_all, links_of
from longctx.planner.evidence import EvidenceNeed, fits, flop_of, largest, needs_of
from longctx.planner.memory import sizes_of
from longctx.planner.remedies import USABLE, DeviceLimits, advice
from longctx.planner.simulate import BACKWARD_WORK, evenly, simulate
from longctx.rope import rope_of_model
from longctx.schedule import Sizes, build_all
from longctx.shape import Shape, shape_of_model
from longctx.storage.files import GIB
from longctx.storage.model import remark_untrained
from longctx.topology import Link, Topology


def run(config: PlanConfig) -> int:
    """Print the table or the schedule that `show` names; the exit status is 0 even if a stage does not fit."""
    if config.show == "schedule":
        return show_schedule(config)
    if config.format == "json":
        emit_json(planned(config))
        return 0
    config, source = resolved(config)
    shape, stages = _stages(config)
    emit(table(config, shape, estimate_all(stages, shape, config), source))
    return 0


def planned(config: PlanConfig) -> dict[str, Any]:
    """The stages in numbers, as `format=json` prints them.

    Raises UserError for settings that training would refuse, and warns of a model that it would refuse.
    """
    config, _ = resolved(config)
    shape, stages = _stages(config)
    return document(config, shape, estimate_all(stages, shape, config))


def resolved(config: PlanConfig) -> tuple[PlanConfig, str]:
    """The config with its model resolved to a folder and a dtype, and in words where the dtype was found.

    A model that the package knows by its hub id is planned from the config.json in the package. A model that training
    would refuse is planned, with a warning.
    """
    path = config.model.path and config_folder(config.model.path)
    model, source = dtypes.resolve(replace(config.model, path=path))
    if path and config.model.path:
        remark_untrained(path, config.model.path)
    return replace(config, model=model), source


def limits_of(config: PlanConfig, shape: Shape) -> DeviceLimits:
    """The memory of the planned devices."""
    machines = Machines(config.nodes * config.ranks, config.ranks)
    hardware = config.hardware
    kernel = planned_kernel(hardware.device, config.model, shape, hardware.capability)
    return DeviceLimits(machines, hardware.device, kernel, hardware.memory_gib * GIB)


def _stages(config: PlanConfig) -> tuple[Shape, list[Stage]]:
    shape, rope = shape_of_model(config.model), rope_of_model(config.model)
    file = "configs/curriculum"
    return shape, resolve(
        config.curriculum, head_dim=rope.head_dim, rope=rope.parameters, window=rope.window, file=file
    )


def document(config: PlanConfig, shape: Shape, estimates: list[Estimate]) -> dict[str, Any]:
    """The JSON document: bytes, flop and seconds of each stage."""
    stages, limits = {}, limits_of(config, shape)
    for item in estimates:
        stages[item.stage.name] = {
            "seq_len": item.stage.seq_len,
            "steps": item.stage.steps,
            "tokens": item.stage.tokens,
            **{name: getattr(item.decision, name) for name in ("cp", "dp", "nodes", "schedule", "ulysses")},
            "per_forward": item.decision.per_forward,
            "micro_steps": item.micro_steps,
            "tokens_per_rank": item.tokens_per_rank,
            "quicker_schedule": item.quicker,
            "memory": {**asdict(item.memory), "total": item.memory.total},
            "fits": limits.holds(item.memory),
            "flop_per_step": item.flop,
            "seconds_per_step": item.seconds,
            "link_seconds_per_step": item.exposed,
            "hours": item.hours,
        }
    evidence = None
    if found := evidence_of(config, shape, len(stages)):
        need, hours = found
        evidence = {**asdict(need), "total": need.total, "hours": hours, "fits": _holds(config, need)}
    return {
        "hardware": asdict(config.hardware),
        "nodes": config.nodes,
        "ranks": config.ranks,
        "dtype": config.model.dtype,
        "kernel": limits.kernel,
        "parameters": shape.parameters,
        "stages": stages,
        "evidence": evidence,
        "hours": sum(item.hours for item in estimates),
        "device_hours": sum(item.hours for item in estimates) * config.nodes * config.ranks,
    }


def evidence_of(config: PlanConfig, shape: Shape, stages: int) -> tuple[EvidenceNeed, float] | None:
    """The largest need of the evidence on the one device that measures it, and its hours; None without any.

    Where ranks are cores, it has all of a node.
    """
    asked, hardware = config.after_training.evidence, config.hardware
    if asked is None or config.model.path is None:
        return None
    on_cpu = hardware.device == "cpu"
    rate = hardware.rate("float32") * config.ranks if on_cpu else hardware.rate(config.model.dtype)
    most = largest(needs_of(asked, shape, config.model.dtype, hardware.device, config.ranks))
    return most, flop_of(config, asked, shape, stages) / rate / 3600


def _holds(config: PlanConfig, need: EvidenceNeed) -> bool:
    devices = config.ranks if config.hardware.device == "cpu" else 1
    return fits(need, config.hardware.memory_gib * GIB * devices)


def machines_words(config: PlanConfig) -> str:
    """The machines of a plan in words, such as `2 nodes of 8 ranks (H100)`."""
    nodes, ranks = (f"{n} {word}{'s' * (n > 1)}" for n, word in ((config.nodes, "node"), (config.ranks, "rank")))
    return f"{nodes} of {ranks} ({config.hardware.name})"


def table(config: PlanConfig, shape: Shape, estimates: list[Estimate], source: str) -> Any:
    """A table of at most 80 columns with a row per stage; source: where the dtype was found, in words."""
    from rich.table import Table

    hardware, limits = config.hardware, limits_of(config, shape)
    title = (
        f"{_count(shape.parameters)} parameters on {machines_words(config)} at "
        f"{hardware.rate(config.model.dtype) / 1e12:.3g} TFLOP/s\nengine {config.engine.name}, "
        f"ZeRO {config.engine.zero}, {config.model.dtype} ({source}), attention kernel {limits.kernel}"
    )
    made = Table(title=title, title_justify="left", box=None, padding=(0, 1, 0, 0))
    for column in ("stage", "schedule"):
        made.add_column(column, no_wrap=True)
    for column in ("cp x dp", "tokens", "owned", "saved", "GiB", "s/step", "links", "steps", "h"):
        made.add_column(column, justify="right", no_wrap=True)
    for item in estimates:
        memory, decision = item.memory, item.decision
        owned = memory.weights + memory.gradients + memory.optimizer
        made.add_row(
            item.stage.name,
            decision.schedule.removesuffix("_ring") + (f" {decision.ulysses}" if decision.ulysses > 1 else ""),
            f"{decision.cp} x {decision.dp}",
            f"{item.tokens_per_rank}",
            _gib(owned),
            _gib(memory.saved),
            _gib(memory.total) + ("" if limits.holds(memory) else "!"),
            _figures(item.seconds, 3),
            f"{item.exposed / item.seconds:.0%}",
            f"{item.stage.steps}",
            _figures(item.hours, 2),
        )
    made.caption, made.caption_justify = escape("\n".join(_notes(config, shape, estimates, limits))), "left"
    return made


def _notes(config: PlanConfig, shape: Shape, estimates: list[Estimate], limits: DeviceLimits) -> list[str]:
    """The lines under the table."""
    hours = sum(item.hours for item in estimates)
    devices = f"{_figures(hours, 3)} hours, {_figures(hours * limits.machines.world, 3)} device-hours"
    lines = ["", f"{devices}; tokens and GiB per device (docs/plan.md)"]
    if host := max(item.memory.host for item in estimates) * config.ranks:
        lines.append(f"offloaded: up to {_gib(host)} GiB in the memory of each node")
    for item in estimates:
        if item.quicker:
            lines.append(f"{item.stage.name}: attention is quicker by parallel.schedule={item.quicker}")
    if evidence := evidence_of(config, shape, len(estimates)):
        need, hours = evidence
        where = "one node" if config.hardware.device == "cpu" else "one device"
        lines.append(
            f"evidence after training, on {where}: {_gib(need.total)} GiB{'' if _holds(config, need) else '!'} for "
            f"{need.tokens:,} tokens ({need.key}), {_figures(hours, 2)} hours"
            + ("" if _holds(config, need) else "; ! train refuses it (docs/eval.md)")
        )
    if not all(limits.holds(item.memory) for item in estimates):
        stages = [item.stage for item in estimates]
        lines.append(
            f"! more than {USABLE:.0%} of {config.hardware.memory_gib:g} GiB, which train refuses. "
            + advice(stages, shape, config, limits)
        )
    return lines


def _figures(value: float, digits: int) -> str:
    """A figure to so many digits, and from 100 on to whole ones: 1,120 and not 1.12e+03."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.{digits}g}"


def _count(number: int) -> str:
    return f"{number / 1e9:.3g}B" if number >= 1e9 else f"{number / 1e6:.3g}M"


def _gib(count: float) -> str:
    return f"{count / GIB:.2f}" if count < 10 * GIB else f"{count / GIB:.1f}"


def show_schedule(config: PlanConfig) -> int:
    """Draw one pass of an attention layer as text, and as SVG if a file is named."""
    draw = config.draw
    schedule, topology, sizes, h, links, speed = _drawn(config)
    backward = draw.direction == "backward"
    schedules = build_all(schedule, topology, backward=backward, ulysses=h)
    block = block_seconds(topology, sizes, speed, schedules[0].ulysses) * (BACKWARD_WORK if backward else 1.0)
    timeline = simulate(schedules, sizes, evenly(block), {"inner": links[0], "outer": links[1]})
    title = (
        f"{schedule}, {draw.direction}, {topology.nodes} nodes x {topology.ranks} ranks, {sizes.tokens} tokens per "
        f"rank on {config.hardware.name}"
    )
    shown = list(range(min(draw.show_ranks, topology.size)))
    if draw.svg:
        Path(draw.svg).write_text(as_svg(timeline, title, nodes=topology.nodes, ranks=shown), encoding="utf-8")
        say(f"wrote {draw.svg}")
    if config.format == "json":
        spans = [asdict(span) for span in timeline.spans]
        emit_json({"schedule": schedule, "seconds": timeline.seconds, "exposed": timeline.exposed(), "spans": spans})
    else:
        print(title)
        print(as_text(timeline, width=draw.width, ranks=shown))
        print(f"{'':8}  waiting for links: {timeline.exposed() / timeline.seconds:.0%} of the time")
    return 0


class _Drawn(NamedTuple):
    """What a drawing shows; ulysses: the ranks that share a position."""

    schedule: str
    topology: Topology
    sizes: Sizes
    ulysses: int
    links: Links
    speed: Speed


def _drawn(config: PlanConfig) -> _Drawn:
    """What to draw: a stage as it is trained, or without one the lengths and heads of `draw`, in bfloat16."""
    draw, hardware = config.draw, config.hardware
    if draw.stage is None:
        topology = Topology(config.nodes, config.ranks)
        h = draw.ulysses or config.ranks
        if draw.schedule == "ulysses_ring" and (topology.ranks % h or draw.heads % h):
            raise UserError(
                f"draw.ulysses={h} must divide ranks={topology.ranks} and heads={draw.heads} (configs/plan.yaml)"
            )
        if draw.seq_len % (2 * topology.size):
            raise UserError(
                f"draw.seq_len={draw.seq_len} is not divisible by 2 x nodes x ranks = {2 * topology.size} "
                "(configs/plan.yaml)"
            )
        sizes = Sizes(draw.seq_len // topology.size, draw.heads, draw.kv_heads, draw.head_dim)
        latency = hardware.latency_us * 1e-6
        inner, outer = (Link(gbytes * 1e9, latency) for gbytes in (hardware.inner_gbytes, hardware.outer_gbytes))
        speed = Speed(hardware.rate("bfloat16"))
        return _Drawn(draw.schedule, topology, sizes, h, (inner, outer), speed)
    config, _ = resolved(config)
    shape, stages = _stages(config)
    names = [item.name for item in stages]
    if draw.stage not in names:
        raise UserError(
            f"draw.stage={draw.stage} is no stage of the curriculum; known: {', '.join(names)} (configs/plan.yaml)"
        )
    item = estimate_all(stages, shape, config)[names.index(draw.stage)]
    decision, dtype = item.decision, config.model.dtype
    sizes = sizes_of(item.stage, shape, decision, dtype)
    links = links_of(decision, Machines(config.nodes * config.ranks, config.ranks), hardware)
    speed = Speed.of(hardware, dtype, planned_kernel(hardware.device, config.model, shape, hardware.capability))
    return _Drawn(decision.schedule, decision.topology, sizes, decision.ulysses, links, speed)
