"""bfloat16 weights are trained through fp32 masters, with gradients accumulated in fp32, by every engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from longctx.config.model import InitConfig, MemoryConfig
from longctx.config.train import EngineConfig, OptimConfig
from longctx.decide import check_engine
from longctx.distributed.ranks import Ranks
from longctx.errors import UserError
from longctx.model import LossModel, init_from
from longctx.planner.memory import deepspeeds_host
from longctx.train import engine as engines
from longctx.train.replicated import MOMENTS
from tests.dist.ranks import run_ranks

SPEC = InitConfig(layers=1, hidden=16, heads=2, kv_heads=1, ffn=24, vocab=32, window=32, seed=3)
SMALL, COUNT = 2.0**-9, 32  # bf16 keeps 8 bits: 1 + 2^-9 is 1


def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(32, (1, 16), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "positions": torch.arange(16), "labels": ids.roll(-1, 1)}


def check_precision(rank: int, world: int, zero: int) -> None:
    ranks = Ranks(rank, world, rank, world, torch.device("cpu"))
    config = EngineConfig(name="deepspeed" if zero else "ddp", zero=zero, device="cpu")  # type: ignore[arg-type]
    optim = OptimConfig(max_grad_norm=0.0)
    place = engines.placer(config, optim, "bfloat16", ranks)
    model = LossModel(init_from(SPEC, dtype="bfloat16", place=place), MemoryConfig())
    engine = engines.build(config, optim, model, ranks)
    try:
        assert engine.facts["weights"] == "bfloat16"
        assert engine.facts["masters"] == engine.facts["gradients"] == "float32"
        engine.backward(engine.forward(**batch()).loss_sum, last=True)
        once = engine.grad_norm()
        engine.discard()
        for number in range(COUNT + 1):
            scale = 1.0 if number == 0 else SMALL
            engine.backward(engine.forward(**batch()).loss_sum * scale, last=number == COUNT)
        assert float(engine.grad_norm() / once) == pytest.approx(1 + COUNT * SMALL, rel=5e-3), (
            "small gradients were lost"
        )
        before = {(f.name, f.start): f.data.clone() for f in engine.fragments() if f.kind == "weight"}
        engine.step(1e-6, float(once))  # far below the distance of neighbouring bf16 numbers
        after: dict[Any, Any] = {(f.name, f.start): f.data for f in engine.fragments() if f.kind == "weight"}
        assert all(data.dtype == torch.float32 for data in after.values())
        moved = sum(int((data != after[key]).sum()) for key, data in before.items())
        assert moved > 0.6 * sum(data.numel() for data in before.values()) > 0  # unread embeddings stay
        moments = [f.data.dtype for f in engine.fragments() if f.kind in ("exp_avg", "exp_avg_sq")]
        assert set(moments) == {torch.float32}
    finally:
        engine.close()


def test_bfloat16_weights_have_wide_masters_and_gradients(tmp_path: Path) -> None:
    failures = run_ranks(2, check_precision, [0, 2, 3], tmp_path / "store")
    assert not failures, "\n".join(f"ZeRO {zero}: {text[0]}" for zero, text in failures.items())


def check_offloaded(rank: int, world: int, zero: int) -> None:
    """The bytes per trained weight of what DeepSpeed keeps on the host are those of the plan."""
    ranks = Ranks(rank, world, rank, world, torch.device("cpu"))
    config = EngineConfig(name="deepspeed", zero=zero, offload_optimizer=True, device="cpu")  # type: ignore[arg-type]
    model = LossModel(init_from(SPEC, dtype="bfloat16"), MemoryConfig())
    engine: Any = engines.build(config, OptimConfig(), model, ranks)
    try:
        engine.backward(engine.forward(**batch()).loss_sum, last=True)
        engine.step(1e-6, float(engine.grad_norm()))
        made = engine.zero
        masters = made.fp32_partitioned_groups_flat if zero == 3 else made.single_partition_of_fp32_groups
        held = [*masters, *(state[kind] for state in made.optimizer.state.values() for kind in MOMENTS)]
        held += [made.grad_partitions_flat_buffer] if zero == 3 else made.param_buffer_of_bit16_for_cpu_offload_groups
        gradients = sum(
            master.numel() * master.element_size() for master in masters
        )  # `step` drops them until the next
        size = gradients + sum(tensor.numel() * tensor.element_size() for tensor in held)
        trained = sum(torch.Size(shape).numel() for shape in engine.shapes().values())
        assert size == pytest.approx(deepspeeds_host(trained, 2, zero, pinned=float), rel=0.01)
    finally:
        engine.close()


def test_what_an_offloaded_optimizer_holds_is_what_the_plan_counts(tmp_path: Path) -> None:
    failures = run_ranks(1, check_offloaded, [2, 3], tmp_path / "store")
    assert not failures, "\n".join(f"ZeRO {zero}: {text[0]}" for zero, text in failures.items())


def test_zero_1_with_bfloat16_is_refused() -> None:
    """DeepSpeed's BF16_Optimizer has none of the fields that fragments are read from."""
    config = EngineConfig(name="deepspeed", zero=1)
    check_engine(config, "float32")
    with pytest.raises(UserError, match=r"engine.zero=1 with model.dtype=bfloat16: .* use engine.zero=2"):
        check_engine(config, "bfloat16")


def test_a_closed_engine_leaves_the_model_as_it_was() -> None:
    """An accumulator or a hook of its own would take the gradients of the model's next user."""
    ranks = Ranks(0, 1, 0, 1, torch.device("cpu"))
    model = LossModel(init_from(SPEC, dtype="bfloat16"), MemoryConfig())
    engine = engines.build(EngineConfig(device="cpu"), OptimConfig(freeze=[]), model, ranks)
    engine.backward(engine.forward(**batch()).loss_sum, last=True)
    assert all(weight.grad is None for weight in model.parameters())
    engine.close()
    model(**batch()).loss_sum.backward()
    assert all(weight.grad is not None for weight in model.parameters())
