"""Out of memory on a rank, in one paragraph: what the plan says it held, and what would make it less."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any, cast

from longctx.errors import OutOfMemory, UserError, out_of_memory

if TYPE_CHECKING:
    from longctx.config.plan import PlanConfig
    from longctx.config.train import TrainConfig
    from longctx.curriculum import Stage
    from longctx.train.ranks import Ranks

GIB = 2.0**30
_WORDS = {
    "weights": "weights", "gradients": "gradients", "optimizer": "optimizer state",
    "saved": "activations saved for the backward pass", "working": "the layer at work", "ring": "attention's buffers",
    "loss": "logits",
}  # fmt: skip


@contextmanager
def explained(config: TrainConfig, stage: Stage, ranks: Ranks, doing: str) -> Iterator[None]:
    """Turn an allocation that fails inside the block into OutOfMemory with the whole explanation.

    doing: what the rank does there, for the message. One rank of a run explains; the others stay silent.
    """
    try:
        yield
    except OutOfMemory:
        raise
    except Exception as error:
        if not out_of_memory(error):
            raise
        text = explain(error, config, stage, ranks, doing) if _first_to_say(ranks) else ""
    else:
        return
    raise OutOfMemory(text)  # outside the handler: the failed step's tensors are free again


def explain(error: BaseException, config: TrainConfig, stage: Stage, ranks: Ranks, doing: str) -> str:
    """The paragraph: where, what was asked for, what a rank holds by the plan, and up to three remedies."""
    from longctx.config.plan import PlanConfig
    from longctx.plan.shape import shape_of
    from longctx.plan.stage import estimate

    said = next(iter(str(error).strip().splitlines()), type(error).__name__)
    said = said.split("] . ")[-1].split(" If reserved")[0].rstrip(".")
    values: dict[str, Any] = {field.name: getattr(config, field.name) for field in fields(cast(Any, config))}
    nodes = max(1, ranks.world // ranks.local_world)
    plan = PlanConfig(**values, nodes=nodes, ranks=ranks.world // nodes)
    shape = shape_of(config.model)

    def held(changed: PlanConfig, at: Stage = stage) -> Any:
        return estimate(at, shape, changed).memory

    now = held(plan)
    parts = sorted(((getattr(now, name), words) for name, words in _WORDS.items()), reverse=True)
    listed = ", ".join(f"{words} {_gib(size)}" for size, words in parts if size > 0.01 * now.total)
    remedies: list[tuple[float, str]] = []
    for text, changed, at in _candidates(plan, stage, cpu=ranks.device.type == "cpu"):
        try:
            total = held(changed, at).total
        except UserError:  # what does not divide is no remedy
            continue
        if total < 0.999 * now.total:
            remedies.append((total, text))
    best = "; ".join([*(f"{text} ({_gib(total)})" for total, text in sorted(remedies)[:3]), "more memory"][:3])
    where = f"rank {ranks.rank}" if ranks.world > 1 else "this process"
    return (
        f"{where} ran out of memory while {doing} stage {stage.name} ({said}). By the plan a rank holds "
        f"{_gib(now.total)} in this stage: {listed}. What makes it less: {best}. `longctx plan` shows every stage "
        "with the same settings (docs/memory.md)"
    )


def _candidates(plan: PlanConfig, stage: Stage, *, cpu: bool) -> Iterator[tuple[str, PlanConfig, Stage]]:
    """(what to set, the plan with it, the stage with it); several need no check of their own, the planner refuses."""
    engine, memory, world = plan.engine, plan.model.memory, plan.nodes * plan.ranks
    if world > 1 and engine.zero < 3:
        yield "engine=deepspeed engine.zero=3", replace(plan, engine=replace(engine, name="deepspeed", zero=3)), stage
    if not cpu:
        if engine.name == "deepspeed" and not engine.offload_optimizer:
            changed = replace(plan, engine=replace(engine, offload_optimizer=True))
            yield "engine.offload_optimizer=true", changed, stage
        if memory.checkpoint and not memory.offload:
            yield "model.memory.offload=true", _with(plan, offload=True), stage
        if plan.nodes == 1:
            yield f"{2 * world} ranks", replace(plan, ranks=2 * world), stage
    for cp in (2 * c for c in range(1, world) if world % (2 * c) == 0):
        parallel = replace(plan.parallel, cp=cp, stages={})
        yield f"parallel.cp={cp}", replace(plan, parallel=parallel), stage
    if not memory.checkpoint:
        yield "model.memory.checkpoint=true", _with(plan, checkpoint=True), stage
    if memory.keep_matmuls:
        yield "model.memory.keep_matmuls=0", _with(plan, keep_matmuls=0), stage
    if engine.micro_batch != 1:
        yield "engine.micro_batch=1", replace(plan, engine=replace(engine, micro_batch=1)), stage
    if not 0 < memory.ffn_block <= 512:
        yield "model.memory.ffn_block=512", _with(plan, ffn_block=512), stage
    if memory.loss_chunk > 128:
        yield "model.memory.loss_chunk=128", _with(plan, loss_chunk=128), stage
    if plan.model.dtype != "bfloat16":
        yield "model.dtype=bfloat16", replace(plan, model=replace(plan.model, dtype="bfloat16")), stage
    half = replace(stage, seq_len=max(2, stage.seq_len // 2))
    yield f"curriculum.stages.{stage.name}.seq_len={half.seq_len}", plan, half


def _with(plan: PlanConfig, **changes: Any) -> PlanConfig:
    memory = replace(plan.model.memory, **changes)
    return replace(plan, model=replace(plan.model, memory=memory))


def _first_to_say(ranks: Ranks) -> bool:
    """Whether no other rank has explained yet; the store of the launcher keeps count."""
    if ranks.world == 1:
        return True
    import torch.distributed as dist

    try:
        return cast(Any, dist.distributed_c10d._get_default_store()).add("out of memory", 1) == 1
    except Exception:  # the store is gone with its rank: better said twice than not at all
        return True


def _gib(size: float) -> str:
    return f"{size / GIB:,.2f} GiB" if size >= 0.01 * GIB else f"{size / 2**20:,.2f} MiB"
