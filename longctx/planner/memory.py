"""Estimates the bytes that one device holds in a stage: weights and optimizer under ZeRO, saved tensors, buffers.

docs/memory.md and docs/attention.md explain the terms. They stay separate, so that the largest can be shown. The
allocator's fragments, communication libraries and the CUDA context are not counted (together 1 to 3 GiB on a GPU).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

from longctx.config.model import MemoryConfig
from longctx.decide import blocks_of, tokens_per_rank
from longctx.dtype import BYTES
from longctx.schedule import RankSchedule, Sizes, build_all
from longctx.shape import Shape
from longctx.topology import Topology

if TYPE_CHECKING:
    from longctx.config.train import TrainConfig
    from longctx.curriculum import Stage
    from longctx.decide import Decision

NODES_SIMULATED = 4
LAYERS_NEAR = 3  # layers whose saved tensors are on the device at once when they are offloaded
REFERENCE_ROWS = 1024  # of longctx.attention.reference
REFERENCE_COPIES = 4  # its backward holds scores, probabilities and the gradients of both
BUCKET = 5e8  # gradients in DeepSpeed's bucket on the device, before they go to where their sum is
SUB_GROUP = 1e9  # weights that DeepSpeed's ZeRO-3 updates at once, from one flat copy of their gradients
PIECE = 1 << 24  # weights that longctx.train.offloaded updates at once
# The name in training of the output layer's weight, by whether it is the embedding too.
HEAD = {False: "model.lm_head.weight", True: "model.model.embed_tokens.weight"}


@dataclass(frozen=True)
class Memory:
    """Bytes on one device.

    saved: tensors that all layers save from forward to backward. working: the layer whose backward runs. ring: buffers
    and accumulators of attention. loss: a chunk's logits, the sum of the head's gradient, and the last hidden states.
    update: temporaries of the optimizer. host: offloaded bytes in the host's memory for this device, which are not part
    of `total`.
    """

    weights: float
    gradients: float
    optimizer: float
    saved: float
    working: float
    ring: float
    loss: float
    update: float = 0.0
    host: float = 0.0

    @property
    def total(self) -> float:
        """The most at one time: loss, a layer's backward and the update of the weights come one after another."""
        step = max(self.saved + max(self.loss, self.working + self.ring), self.update)
        return self.weights + self.gradients + self.optimizer + step


def pool_bytes(schedule: RankSchedule, sizes: Sizes) -> int:
    """Bytes of the executor's buffers in one call: the packed own block, foreign KV and dKV, gathered KV."""
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
    """Bytes of the pool, of the accumulators (out, dq, dk, dv) and of what Ulysses gathers, in the larger pass."""
    wide = max(4, sizes.wire_bytes)
    k = sizes.batch * sizes.tokens * sizes.kv_heads * sizes.head_dim
    q = sizes.batch * sizes.tokens * sizes.q_heads * sizes.head_dim
    totals = []
    for schedule in schedules:
        exchanged = (3 * q if schedule.backward else q) + 2 * k if schedule.ulysses > 1 else 0
        accumulators = (q + 2 * k if schedule.backward else q) * wide
        totals.append(pool_bytes(schedule, sizes) + accumulators + exchanged * sizes.wire_bytes)
    return float(max(totals))


def sizes_of(stage: Stage, shape: Shape, decision: Decision, dtype: str) -> Sizes:
    """The sizes of attention on one rank in one forward pass; gradients travel in at least fp32."""
    b = BYTES[dtype]
    tokens = tokens_per_rank(stage, decision.cp)
    return Sizes(tokens, shape.heads, shape.kv_heads, shape.head_dim, decision.per_forward, b, max(b, 4))


@lru_cache(maxsize=256)
def attention_buffers(schedule: str, topology: Topology, sizes: Sizes, ulysses: int, kernel: str) -> float:
    """Bytes of one attention call: its buffers, and the scores of a block of rows if the reference kernel runs.

    At most NODES_SIMULATED nodes are counted, because buffers do not grow with more nodes. A single rank has none where
    one call of the kernel serves all documents; that cuDNN leaves short ones to another kernel is not counted.
    """
    small = Topology(min(topology.nodes, NODES_SIMULATED), topology.ranks)
    found = 0.0
    if small.size > 1:
        passes = [build_all(schedule, small, backward=backward, ulysses=ulysses) for backward in (False, True)]
        found = max(ring_buffers(both, sizes) for both in zip(*passes, strict=True))
    if kernel != "reference":
        return found
    rows = min(REFERENCE_ROWS, sizes.tokens)
    return found + REFERENCE_COPIES * max(4, sizes.wire_bytes) * sizes.batch * sizes.q_heads * rows * sizes.tokens


def need(
    stage: Stage, shape: Shape, config: TrainConfig, decision: Decision, *, world: int, kernel: str, device: str
) -> Memory:
    """Bytes that one device holds in a stage of a training run.

    device: cuda, or cpu, where offloading frees no memory.
    """
    sizes = sizes_of(stage, shape, decision, config.model.dtype)
    engine = config.engine
    return stage_memory(
        shape,
        config.model.memory,
        device=device,
        tokens=sizes.tokens * decision.per_forward,
        dtype=config.model.dtype,
        zero=engine.zero,
        world=world,
        secondary=engine.hpz_partition_size,
        trained=trained_weights(shape, config.optim.freeze),
        head_trained=not any(fnmatch(HEAD[shape.tied], pattern) for pattern in config.optim.freeze),
        ring=attention_buffers(decision.schedule, decision.topology, sizes, decision.ulysses, kernel),
        offloaded=engine.offload_ratio if engine.offload_optimizer and device != "cpu" else 0.0,
        offload_parameters=engine.offload_parameters and device != "cpu",
        offload_saved=config.model.memory.offload_activations and device != "cpu",
    )


def trained_weights(shape: Shape, freeze: Sequence[str]) -> int:
    """The number of weights that have gradients, without the parameters that `optim.freeze` names."""
    e, q, kv = shape.hidden, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    of_layer = {
        "self_attn.q_proj": e * q, "self_attn.k_proj": e * kv, "self_attn.v_proj": e * kv, "self_attn.o_proj": q * e,
        "mlp.gate_proj": e * shape.ffn, "mlp.up_proj": e * shape.ffn, "mlp.down_proj": e * shape.ffn,
        "input_layernorm": e, "post_attention_layernorm": e,
    }  # fmt: skip
    counts = {HEAD[True]: shape.vocab * e, "model.model.norm.weight": e}
    if not shape.tied:
        counts[HEAD[False]] = shape.vocab * e
    for layer in range(shape.layers):
        counts |= {f"model.model.layers.{layer}.{name}.weight": count for name, count in of_layer.items()}
    frozen = {name for name in counts if any(fnmatch(name, pattern) for pattern in freeze)}
    return shape.parameters - sum(counts[name] for name in frozen)


def stage_memory(
    shape: Shape,
    memory: MemoryConfig,
    *,
    tokens: int,
    dtype: str,
    zero: int,
    world: int,
    ring: float,
    secondary: int = 1,
    device: str = "cpu",
    trained: int | None = None,
    head_trained: bool = True,
    offloaded: float = 0.0,
    offload_parameters: bool = False,
    offload_saved: bool = False,
) -> Memory:
    """Bytes that one device holds, from plain numbers.

    tokens: tokens on this device in one forward. zero: 0 (replicated) to 3. ring: bytes of `attention_buffers`.
    secondary: ranks that share a second copy of the weights (hpZ, ZeRO++ 2306.10209); 1: there is none. device: cuda or
    cpu, for sizes that are auto. trained: the number of weights that have gradients and moments (None: all), among them
    the output layer's if head_trained. fp32 and fp64 weights are their own masters; bfloat16 ones have fp32 masters in
    the optimizer. Gradients are at least fp32. offloaded: the share of the optimizer states that is in host memory.
    """
    b = BYTES[dtype]
    p = shape.parameters
    owned = _owned(p if trained is None else trained, b, zero, world, offloaded, device)
    weights = p * b / (world if zero >= 3 else 1)
    copy = p * b / secondary if zero >= 3 and secondary > 1 else 0.0
    gathered = 2 * shape.layer_weights * b if zero >= 3 else 0  # the layer at work and the one fetched ahead
    cost = shape.footprint(b)
    matmuls = cost.kept_layers(memory, tokens)
    kept = cost.kept if memory.keep_attention else cost.inputs
    saved = tokens * (shape.layers * kept + matmuls * cost.products)
    if not memory.activation_checkpointing:
        saved = tokens * shape.layers * cost.everything
    near = tokens * LAYERS_NEAR * (kept + (cost.products if matmuls else 0))
    at_work = cost.working + (cost.kept - kept)
    sizes = blocks_of(memory, device)
    block = min(sizes.ffn_block or tokens, tokens)
    wide_block, weight, out = (
        size * b for size in (block * shape.ffn, shape.hidden * shape.ffn, shape.hidden * shape.query)
    )
    main = not zero and b < 4  # engine=ddp's fp32 accumulators of gradients
    made, before = _block_gradients(weight, out, b, main, block < tokens, device)
    feed_forward = 3 * tokens * shape.hidden * b + max(6 * wide_block, 3 * wide_block + made) + before
    return Memory(
        weights=copy + gathered if offload_parameters else weights + copy + gathered,
        gradients=owned.gradients,
        optimizer=owned.optimizer,
        saved=min(saved, near) if offload_saved else saved,
        working=float(max(tokens * at_work, feed_forward)),
        ring=ring,
        loss=_loss(shape, b, tokens, sizes.loss_chunk, head_trained, device, main),
        update=owned.staged,
        host=owned.host + weights * offload_parameters + saved * offload_saved,
    )


def _block_gradients(weight: int, out: int, b: int, main: bool, blocks: bool, device: str) -> tuple[float, float]:
    """Bytes of gradients that a feed-forward block makes at one time, and of what the blocks before it gave.

    weight: bytes of one of three weights, out of o_proj's, b of an element. Products add to an accumulator (main) or,
    in several blocks of narrow weights, to fp32 sums, of which the last block makes narrow copies
    (longctx.model.products); only a CPU makes the product first.
    """
    product = weight if device == "cpu" else 0
    if main:
        return product, 0
    if blocks and b < 4:
        return product, (3 * weight + out) * 4 / b + weight
    return 2 * weight, 3 * weight + out if blocks else 0


def _loss(shape: Shape, b: int, tokens: int, chunk: int, head_trained: bool, device: str, main: bool) -> float:
    """Bytes of longctx.model.loss: logits as the product gives them and wide, the head's gradient, hidden states.

    The gradient's sum is wide. Unless it is added to an accumulator (main), a copy in b bytes comes after the logits.
    On a CPU there is also a product before each sum.
    """
    wide = max(4, b)
    narrow = b if b < wide else 0
    logits = min(chunk, tokens) * shape.vocab * (wide + narrow)
    head = shape.vocab * shape.hidden * head_trained
    most = head * wide + max(logits + (head * narrow if device == "cpu" else 0), 0 if main else head * narrow)
    return float(most + 3 * tokens * shape.hidden * b)


class _Owned(NamedTuple):
    """Bytes of a rank's engine beside the weights: on the device, on the host, and temporaries of an update."""

    gradients: float
    optimizer: float
    host: float = 0.0
    staged: float = 0.0


def _owned(t: int, b: int, zero: int, world: int, offloaded: float, device: str) -> _Owned:
    """What an engine holds for t trained weights of b bytes; the other arguments as in `stage_memory`."""
    wide = max(4, b)
    optimizer = t * (2 * wide if b >= 4 else 3 * wide) / (world if zero >= 1 else 1)
    gradients = float(t * wide) / (world if zero >= 2 else 1)
    if not zero:
        staged = min(PIECE, t) * 3.0 * wide if offloaded else 0.0
        if device == "cpu" and wide < 8:  # a CPU forms the norm in fp64 from a copy
            staged = 8.0 * t
        return _Owned(gradients, (1 - offloaded) * optimizer, offloaded * optimizer, staged)
    if offloaded:  # DeepSpeed has all states there, and the gradients
        return _Owned(bucket_bytes(b, zero), 0.0, deepspeeds_host(t / world, b, zero))
    bucket = bucket_bytes(b, zero) if device == "cuda" else 0.0  # on a CPU only used pages count
    return _Owned(gradients + bucket, optimizer, staged=min(SUB_GROUP, t / world) * wide if zero >= 3 else 0.0)


def power_of_two(size: float) -> float:
    """What a block of `size` bytes takes in torch's pinned memory."""
    return 2.0 ** math.ceil(math.log2(size)) if size > 1 else size


def bucket_bytes(b: int, zero: int) -> float:
    """Bytes of DeepSpeed's gradient buckets on a GPU: ZeRO-3 has one in fp32, ZeRO-2 two in the weights' dtype."""
    return BUCKET * 4.0 if zero >= 3 else BUCKET * 2.0 * b


def deepspeeds_host(share: float, b: int, zero: int, pinned: Callable[[float], float] = power_of_two) -> float:
    """Bytes that DeepSpeed's offloaded optimizer keeps on the host for a rank's `share` of the weights, of b bytes.

    They are the master, two moments and the gradient. ZeRO-3 has the gradient twice, once for its own sum and once for
    the optimizer; ZeRO-1 and 2 have a copy of the weight, from which it returns to the device. What travels is in
    torch's pinned memory. pinned: the bytes that such a block takes.
    """
    wide = max(4, b)
    if zero < 3:
        return 2 * wide * share + 2 * pinned(wide * share) + pinned(b * share)
    groups, rest = divmod(share, SUB_GROUP)
    return 3 * wide * share + pinned(wide * share) + groups * pinned(wide * SUB_GROUP) + pinned(wide * rest)
