"""Memory terms: the pool against the executor's own, ZeRO's shares, parameters against a real model."""

import pytest
import torch

from longctx.attention import ContextParallel
from longctx.config.model import InitConfig, MemoryConfig
from longctx.distributed.thread_transport import ThreadWorld
from longctx.planner.memory import BUCKET, deepspeeds_host, pool_bytes, stage_memory
from longctx.schedule import Sizes, build
from longctx.shape import shape_of_init
from longctx.topology import Topology

INIT = InitConfig(layers=3, hidden=64, heads=4, kv_heads=2, ffn=96, vocab=128, window=256)


@pytest.mark.parametrize(
    ("schedule", "nodes", "ranks"),
    [
        ("flat_ring", 1, 2),
        ("flat_ring", 2, 2),
        ("double_ring", 2, 2),
        ("double_ring", 3, 2),
        ("allgather_ring", 2, 3),
    ],
)
def test_the_pool_is_what_the_executor_allocates(schedule, nodes, ranks):
    topology, tokens = Topology(nodes, ranks), 32
    sizes = Sizes(tokens, 4, 2, 16, wire_bytes=4, grad_bytes=4)

    def work(transport):
        cp = ContextParallel(transport, topology, schedule)
        layout = cp.layout(seq_len=tokens * topology.size)
        q, k, v, grad = (torch.randn(1, heads, tokens, 16) for heads in (4, 2, 2, 4))
        attention = layout.cache.prepare(layout.arithmetic.boundaries)
        out, lse = attention.forward(q, k, v, 0.25)
        ahead = cp.pool.total
        cp.pool.clear()
        attention.backward(grad, q, k, v, out, lse, 0.25)
        return ahead, cp.pool.total

    for rank, counted in enumerate(ThreadWorld(topology.size).run(work)):
        schedules = [build(schedule, topology, rank, backward=backward) for backward in (False, True)]
        assert counted == tuple(pool_bytes(schedule, sizes) for schedule in schedules)


@pytest.mark.parametrize("tied", [False, True])
def test_parameters_are_those_of_the_model(tied):
    from longctx.model.load import init_from

    init = InitConfig(**{**vars(INIT), "tie_embeddings": tied})
    model = init_from(init, attention="sdpa")
    shape = shape_of_init(init)
    assert shape.parameters == sum(p.numel() for p in model.parameters())


def test_zero_divides_what_it_shards_and_nothing_else():
    shape = shape_of_init(INIT)
    p = shape.parameters

    def owned(zero, dtype="float32", **more):
        m = stage_memory(shape, MemoryConfig(), tokens=64, dtype=dtype, zero=zero, world=4, ring=0.0, **more)
        return m.weights, m.gradients, m.optimizer

    assert owned(0) == (4 * p, 4 * p, 8 * p)
    assert owned(1) == (4 * p, 4 * p, 2 * p)
    assert owned(2) == (4 * p, p, 2 * p)
    assert owned(3)[0] == p + 2 * shape.layer_weights * 4
    assert owned(3, secondary=2)[0] == p + 2 * p + 2 * shape.layer_weights * 4  # hpZ: another copy in each pair
    assert owned(0, "bfloat16") == (2 * p, 4 * p, 12 * p)


def test_offloaded_gradients_leave_the_device_with_the_optimizer():
    """DeepSpeed's bucket stays on the device; tests/train/test_precision.py checks the layout on the host."""
    shape = shape_of_init(INIT)

    def planned(zero):
        return stage_memory(
            shape, MemoryConfig(), tokens=64, dtype="bfloat16", zero=zero, world=4, ring=0.0, device="cuda",
            offloaded=1.0,
        )  # fmt: skip

    two, three = planned(2), planned(3)
    assert (two.optimizer, three.optimizer) == (0.0, 0.0)
    assert (two.gradients, three.gradients) == (2 * BUCKET * 2, BUCKET * 4)
    share = shape.parameters / 4
    assert deepspeeds_host(share, 2, 2, pinned=float) == share * (4 + 8 + 4 + 2)
    assert deepspeeds_host(share, 2, 3, pinned=float) == share * (4 + 8 + 4 + 4)
    assert 65536 < 4 * share < 131072, "what is pinned is rounded up"
    assert two.host == 8 * share + 131072 + 131072 + 65536
    assert three.host == 12 * share + 131072 + 131072


def test_deepspeeds_buckets_are_on_a_gpu_and_zero_3_updates_from_a_second_copy():
    """Of the gradient, at most 10^9 weights at once; it counts where it is more than a step's activations."""
    large = shape_of_init(InitConfig(layers=1, hidden=4096, heads=32, kv_heads=8, ffn=14336, vocab=256))
    p = large.parameters

    def planned(zero, device):
        return stage_memory(
            large, MemoryConfig(), tokens=64, dtype="bfloat16", zero=zero, world=1, ring=0.0, device=device
        )

    assert [planned(zero, "cuda").gradients - 4 * p for zero in (0, 2, 3)] == [0, 2 * BUCKET * 2, BUCKET * 4]
    assert planned(3, "cpu").gradients == 4 * p
    three, two = planned(3, "cpu"), planned(2, "cpu")
    assert (three.update, two.update) == (4 * p, 0)
    assert three.total - (three.weights + three.gradients + three.optimizer) == pytest.approx(4 * p)
    assert two.saved + max(two.working, two.loss) < 3 * p
    assert planned(0, "cpu").update == 8 * p  # the norm in fp64 is formed from a copy


def test_full_recomputation_keeps_inputs_and_one_layers_attention():
    shape = shape_of_init(INIT)

    def planned(keep, **more):
        memory = MemoryConfig(keep_attention=keep, ffn_block=256)
        return stage_memory(shape, memory, tokens=4096, dtype="float32", zero=0, world=1, ring=0.0, **more)

    selective, full = planned(True), planned(False)
    assert full.saved == 3 * 4096 * 64 * 4
    assert full.working - selective.working == 4096 * (64 * 4 + 4 * 4)
    assert full.total < selective.total
    assert planned(False, offload_saved=True).host == full.saved


def test_checkpoints_keep_input_output_and_lse_of_every_layer():
    shape = shape_of_init(INIT)
    kept = stage_memory(shape, MemoryConfig(), tokens=64, dtype="float32", zero=0, world=1, ring=0.0)
    assert kept.saved == 3 * 64 * (64 * 4 + 64 * 4 + 4 * 4)
    whole = stage_memory(
        shape, MemoryConfig(activation_checkpointing=False), tokens=64, dtype="float32", zero=0, world=1, ring=0.0
    )
    assert whole.saved > 3 * kept.saved


def test_what_the_planner_copies_from_code_with_torch_is_equal_there():
    import inspect

    from longctx.attention import reference
    from longctx.eval.loss import token_losses
    from longctx.planner import evidence, memory
    from longctx.train import offloaded

    assert memory.REFERENCE_ROWS == reference.ROWS
    assert memory.PIECE == offloaded.PIECE
    assert inspect.signature(token_losses).parameters["chunk"].default == evidence.PIECE
