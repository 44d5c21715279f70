"""Checks whether a curriculum fits the memory of its devices, and finds settings that would make it fit.

`longctx plan` marks a stage that does not fit, and `longctx train` refuses it. Both advise only changes that fit by the
same estimate.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from longctx.config.train import TrainConfig
from longctx.curriculum import Stage
from longctx.decide import Machines, blocks_of, decide_all
from longctx.errors import UserError
from longctx.planner.memory import Memory, need
from longctx.shape import Shape
from longctx.storage.files import GIB

USABLE = 0.92  # share of the memory; the allocator's fragments, communication and the CUDA context take the rest
Changes = dict[str, Any]


@dataclass(frozen=True)
class DeviceLimits:
    """The memory of the devices that a run would use.

    device: cuda or cpu. device_bytes: memory of one device (on a CPU: one rank's share of the machine's memory).
    host_bytes: the host's memory of one node with GPUs, or None if it is unknown or is the devices' own.
    """

    machines: Machines
    device: str
    kernel: str
    device_bytes: float
    host_bytes: float | None = None

    def holds(self, memory: Memory) -> bool:
        """Whether devices and hosts have enough memory."""
        on_host = self.host_bytes is None or memory.host * self.machines.ranks_per_node <= USABLE * self.host_bytes
        return memory.total <= USABLE * self.device_bytes and on_host


def needs(stages: Sequence[Stage], shape: Shape, config: TrainConfig, limits: DeviceLimits) -> list[Memory]:
    """Bytes that one device holds in each stage; raises UserError for a stage that does not divide over the ranks."""
    heads = (shape.heads, shape.kv_heads)
    decisions = decide_all(stages, config.parallel, config.engine, limits.machines, heads, config.model.dtype)
    return [
        need(stage, shape, config, made, world=limits.machines.world, kernel=limits.kernel, device=limits.device)
        for stage, made in zip(stages, decisions, strict=True)
    ]


def check_memory(stages: Sequence[Stage], shape: Shape, config: TrainConfig, limits: DeviceLimits) -> None:
    """Raise UserError for the first stage that does not fit, with its need and up to three changes that would help."""
    found = zip(stages, needs(stages, shape, config, limits), strict=True)
    stage, memory = next((pair for pair in found if not limits.holds(pair[1])), (None, None))
    if stage is None or memory is None:
        return
    what = "device" if limits.device == "cuda" else "rank"
    have = USABLE * limits.device_bytes / GIB
    if memory.total <= USABLE * limits.device_bytes and limits.host_bytes is not None:
        what, have = "node beside its devices", USABLE * limits.host_bytes / GIB
        wanted = memory.host * limits.machines.ranks_per_node / GIB
        parts = "what is offloaded"
    else:
        wanted = memory.total / GIB
        parts = ", ".join(f"{name} {getattr(memory, name) / GIB:.3g}" for name in _largest(memory))
    raise UserError(
        f"stage {stage.name} of {stage.seq_len:,} tokens needs about {wanted:.3g} GiB on each {what} ({parts}), and "
        f"{have:.3g} GiB can be used there. {advice(stages, shape, config, limits)} accept=[memory] starts it all the "
        "same; `longctx plan` shows every stage (docs/plan.md)"
    )


def advice(stages: Sequence[Stage], shape: Shape, config: TrainConfig, limits: DeviceLimits) -> str:
    """One sentence with the changes that would make every stage fit."""
    ways = remedies(stages, shape, config, limits)
    return f"What would fit: {'; or '.join(ways)}." if ways else "No setting here makes it fit: take shorter stages."


def remedies(
    stages: Sequence[Stage], shape: Shape, config: TrainConfig, limits: DeviceLimits, limit: int = 3
) -> list[str]:
    """Changes with which every stage fits, as words for the command line, the mildest first."""
    ways: list[Changes] = []
    for candidate in _candidates(config, limits):
        changes = {key: value for key, value in candidate.items() if _get(config, key) != value}
        known = any(way.items() <= changes.items() for way in ways)  # a part of these changes is enough
        if not known and len(ways) < limit and _fits(stages, shape, _with(config, changes), limits):
            ways.append(changes)
    found = [" ".join(_spelt(key, value) for key, value in way.items()) for way in ways]
    found += [f"{times} times as many nodes" for times in _more_nodes(stages, shape, config, limits)]
    last = [stage for stage in stages if _fits([stage], shape, config, limits)]
    if last and len(last) < len(stages):
        found.append(f"'curriculum.only=[{','.join(stage.name for stage in last)}]'")
    return found[:limit]


def _largest(memory: Memory) -> list[str]:
    names = [field.name for field in dataclasses.fields(memory) if field.name != "host"]
    return sorted(names, key=lambda name: -getattr(memory, name))[:3]


def lower(
    stage: Stage, shape: Shape, config: TrainConfig, limits: DeviceLimits, limit: int = 3
) -> list[tuple[str, Memory]]:
    """Single settings that lower the memory of this stage, the strongest first, each with the memory it leads to."""
    now = needs([stage], shape, config, limits)[0].total
    found: list[tuple[str, Memory]] = []
    narrower: list[Changes] = [{"model.dtype": "bfloat16"}] if config.model.dtype != "bfloat16" else []
    for changes in [*_dials(config, limits), *_shards(config, limits), *narrower]:
        changed = _with(config, changes)
        try:
            memory = needs([stage], shape, changed, limits)[0] if changed is not None else None
        except UserError:  # training would refuse this setting
            continue
        if memory is not None and memory.total < 0.999 * now:
            found.append((" ".join(_spelt(key, value) for key, value in changes.items()), memory))
    return sorted(found, key=lambda way: way[1].total)[:limit]


def _candidates(config: TrainConfig, limits: DeviceLimits) -> Iterator[Changes]:
    """Single settings first, then ZeRO and offloading, then combinations of both."""
    dials, shards = _dials(config, limits), _shards(config, limits)
    yield from dials
    yield from shards
    for shard in shards:
        for dial in dials[::-1]:
            yield {**shard, **dial}


def _dials(config: TrainConfig, limits: DeviceLimits) -> list[Changes]:
    memory = config.model.memory
    sizes = blocks_of(memory, limits.device)
    dials: list[Changes] = []
    if not memory.activation_checkpointing:
        dials.append({"model.memory.activation_checkpointing": True})
    if memory.keep_matmuls:
        dials.append({"model.memory.keep_matmuls": 0})
    if config.engine.micro_batch != 1:
        dials.append({"engine.micro_batch": 1})
    if not 0 < sizes.ffn_block <= 512:
        dials.append({"model.memory.ffn_block": 512})
    if sizes.loss_chunk > 128:
        dials.append({"model.memory.loss_chunk": 128})
    tokens = config.parallel.seq_len_per_rank // 2
    while config.parallel.cp == "auto" and tokens >= 512 and limits.machines.world > 1:
        dials.append({"parallel.seq_len_per_rank": tokens})
        tokens //= 2
    if config.parallel.cp not in ("auto", "all") or config.parallel.cp_by_stage:
        dials.append({"parallel.cp": limits.machines.world, "parallel.cp_by_stage": {}})
    if limits.device == "cuda" and not memory.offload_activations:
        dials.append({"model.memory.offload_activations": True})
    if memory.activation_checkpointing and memory.keep_attention:
        dials.append({"model.memory.keep_attention": False})
    return dials


def _shards(config: TrainConfig, limits: DeviceLimits) -> list[Changes]:
    shards: list[Changes] = []
    all_states: Changes = {} if config.engine.offload_ratio == 1 else {"engine.offload_ratio": 1}
    deepspeed: Changes = {"engine.name": "deepspeed", **all_states}  # it offloads no share of the states
    for zero in (2, 3):
        if limits.machines.world > 1 and zero > config.engine.zero and config.model.dtype != "float64":
            shards.append({**deepspeed, "engine.zero": zero})
    if limits.device == "cuda" and config.engine.name == "ddp":
        shards.append({"engine.offload_optimizer": True, **all_states})
    if limits.device == "cuda" and config.model.dtype != "float64":
        whole = {**deepspeed, "engine.zero": 3, "engine.offload_optimizer": True}
        shards += [whole, {**whole, "engine.offload_parameters": True}]
    return shards


def _fits(stages: Sequence[Stage], shape: Shape, config: TrainConfig | None, limits: DeviceLimits) -> bool:
    if config is None:
        return False
    try:
        return all(limits.holds(memory) for memory in needs(stages, shape, config, limits))
    except UserError:
        return False


def _more_nodes(stages: Sequence[Stage], shape: Shape, config: TrainConfig, limits: DeviceLimits) -> Iterator[int]:
    """The smallest multiple of the nodes, up to 64 times, on which every stage fits."""
    for times in (2, 4, 8, 16, 32, 64):
        machines = Machines(times * limits.machines.world, limits.machines.ranks_per_node)
        if limits.device == "cuda" and _fits(stages, shape, config, dataclasses.replace(limits, machines=machines)):
            yield times
            return


def _with(config: TrainConfig, changes: Changes) -> TrainConfig | None:
    """The config with these keys changed, or None if they contradict others."""
    try:
        for key, value in changes.items():
            config = _set(config, key.split("."), value)
    except ValueError:
        return None
    return config


def _set(part: Any, path: list[str], value: Any) -> Any:
    inner = value if len(path) == 1 else _set(getattr(part, path[0]), path[1:], value)
    return dataclasses.replace(part, **{path[0]: inner})


def _get(config: TrainConfig, key: str) -> Any:
    part: Any = config
    for name in key.split("."):
        part = getattr(part, name)
    return part


def _spelt(key: str, value: Any) -> str:
    if key == "engine.name":
        return f"engine={value}"
    return f"{key}={str(value).lower() if isinstance(value, bool) else value}"
