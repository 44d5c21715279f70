"""Bytes one device holds in a stage: weights and optimizer under ZeRO, what is kept for backward, buffers.

The terms are those of docs/memory.md and docs/attention.md, each on its own line, so that the largest
shows. Not counted: the allocator's fragments, communication libraries, and the CUDA context (together 1
to 3 GiB on a GPU).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

from longctx.config.model import MemoryConfig
from longctx.schedule import RankSchedule, Sizes
from longctx.shape import Shape

BYTES = {"float32": 4, "bfloat16": 2, "float64": 8}


@dataclass(frozen=True)
class Memory:
    """Bytes on one device. saved: kept from forward to backward over all layers; working: one layer at
    work.
    """

    weights: float
    gradients: float
    optimizer: float
    saved: float
    working: float
    ring: float
    loss: float

    @property
    def total(self) -> float:
        return sum(getattr(self, field.name) for field in fields(self))


def pool_bytes(schedule: RankSchedule, sizes: Sizes) -> int:
    """What the executor's pool lends to one call: the packed own block, foreign KV and dKV, gathered KV."""
    k = (
        sizes.batch
        * sizes.tokens
        * max(sizes.kv_heads, schedule.ulysses if schedule.ulysses > 1 else 0)
        * sizes.head_dim
    )
    gathered = max((len(hop.compute.slots) for hop in schedule.ring if hop.compute is not None), default=1)
    kv = (schedule.kv_slots + 1 if schedule.kv_slots else 0) + (gathered if gathered > 1 else 0)
    return 2 * k * (kv * sizes.wire_bytes + schedule.dkv_slots * sizes.grad_bytes)


def ring_buffers(schedules: Sequence[RankSchedule], sizes: Sizes) -> float:
    """The pool, fp32 accumulators of out, dq, dk and dv, and what Ulysses gathers, at the larger pass."""
    wide = max(4, sizes.wire_bytes)
    k = sizes.batch * sizes.tokens * sizes.kv_heads * sizes.head_dim
    q = sizes.batch * sizes.tokens * sizes.q_heads * sizes.head_dim
    totals = []
    for schedule in schedules:
        exchanged = (3 * q if schedule.backward else q) + 2 * k if schedule.ulysses > 1 else 0
        accumulators = (q + 2 * k if schedule.backward else q) * wide
        totals.append(pool_bytes(schedule, sizes) + accumulators + exchanged * sizes.wire_bytes)
    return float(max(totals))


def stage_memory(
    shape: Shape,
    memory: MemoryConfig,
    *,
    tokens: int,
    dtype: str,
    zero: int,
    world: int,
    ring: float,
    offload_optimizer: bool = False,
    offload_parameters: bool = False,
) -> Memory:
    """tokens: on this device per forward. zero: 0 (replicated) to 3. ring: bytes of `ring_buffers`.

    fp32 weights are their own masters; others keep fp32 masters with the optimizer. Gradients are fp32.
    """
    b = BYTES[dtype]
    p = shape.parameters
    optimizer = p * (8 if b >= 4 else 12) / (world if zero >= 1 else 1)
    weights = p * b / (world if zero >= 3 else 1)
    gathered = 2 * shape.layer_weights * b if zero >= 3 else 0  # the layer at work and the one fetched ahead
    cost = shape.footprint(b)
    everything = shape.layers if not memory.checkpoint else 0
    matmuls = memory.keep_matmuls if isinstance(memory.keep_matmuls, int) else 0
    saved = tokens * (shape.layers * cost.kept + (everything + min(matmuls, shape.layers)) * cost.products)
    block = min(memory.ffn_block or tokens, tokens)
    feed_forward = tokens * 3 * shape.hidden * b + block * 5 * shape.ffn * b
    return Memory(
        weights=0.0 if offload_parameters else weights + gathered,
        gradients=p * 4 / (world if zero >= 2 else 1),
        optimizer=0.0 if offload_optimizer else optimizer,
        saved=0.0 if memory.offload else saved,
        working=float(max(tokens * cost.working, feed_forward)),
        ring=ring,
        loss=min(memory.loss_chunk, tokens) * shape.vocab * 4.0 * 2,
    )
