"""Optimizer states in host memory, all or a share of them: the same bits as on the device, saved and continued too."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from longctx.config.base import build
from longctx.config.model import InitConfig, MemoryConfig
from longctx.config.train import EngineConfig, OptimConfig
from longctx.decide import check_engine
from longctx.distributed.ranks import Ranks
from longctx.errors import UserError
from longctx.model import LossModel, init_from
from longctx.model.host import HostMemory
from longctx.planner.memory import stage_memory
from longctx.shape import shape_of_init
from longctx.signals import SAVED_AND_REQUEUE
from longctx.train import engine as engines
from longctx.train.offloaded import PIECE, Offloaded, OffloadedAdamW, on_host
from longctx.train.train import train
from tests.dist.ranks import run_ranks

from .made import config, losses
from .test_run import stop_after
from .test_worlds import continued, same

SPEC = InitConfig(layers=2, hidden=16, heads=2, kv_heads=1, ffn=24, vocab=32, window=32, seed=3)


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=30), st.floats(0.01, 1.0))
def test_the_share_on_the_host_is_the_ratio_but_for_one_parameter(sizes: list[int], ratio: float) -> None:
    chosen = on_host(sizes, ratio)
    away = sum(size for size, taken in zip(sizes, chosen, strict=True) if taken)
    assert away <= ratio * sum(sizes)
    left = [size for size, taken in zip(sizes, chosen, strict=True) if not taken]
    assert not left or away + min(left) > ratio * sum(sizes)
    assert on_host(sizes, 1.0) == [True] * len(sizes)


@settings(max_examples=30)
@given(st.integers(1, 700), st.integers(1, 5), st.sampled_from([torch.float32, torch.float64]), st.booleans())
def test_pieces_are_updated_as_the_whole_is(size: int, units: int, dtype: torch.dtype, narrow: bool) -> None:
    """narrow: the trained weight is bfloat16 and its master on the host."""
    generator = torch.Generator().manual_seed(size)
    first, gradients = torch.randn(size, dtype=dtype, generator=generator), torch.randn(4, size, dtype=dtype)
    theirs = torch.nn.Parameter(first.clone())
    plain = torch.optim.AdamW([theirs], lr=0.1, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, fused=True)
    weight = first.to(torch.bfloat16) if narrow else first.clone()
    master = first.clone() if narrow else weight
    gradient = torch.zeros(size, dtype=dtype)
    memory = HostMemory(torch.device("cpu"))
    ours = OffloadedAdamW([Offloaded(weight, master, gradient, 0.1)], memory, (0.9, 0.95), 1e-8, piece=64 * units)
    for values in gradients:
        theirs.grad = values.clone()
        plain.step()
        gradient.copy_(values)
        ours.step(0.1)
    assert master.equal(theirs.data)
    assert weight.equal(theirs.data.to(weight.dtype))
    assert ours.state[master]["exp_avg_sq"].equal(plain.state[theirs]["exp_avg_sq"])
    assert float(ours.state[master]["step"]) == 4


def test_a_piece_is_a_whole_number_of_what_a_kernel_computes_at_once() -> None:
    assert PIECE % 64 == 0


@dataclass(frozen=True)
class Case:
    dtype: str
    ratios: tuple[float, ...] = (0.5,)
    freeze: tuple[str, ...] = ()


def trained(case: Case, ranks: Ranks, **engine: Any) -> dict[tuple[str, str], torch.Tensor]:
    """The fragments of this rank after three steps, one of which is clipped, and its share of the weights' bits."""
    settings = build(EngineConfig, {"device": "cpu", **engine}, origin="test")
    optim = OptimConfig(weight_decay=0.1, max_grad_norm=0.05, freeze=list(case.freeze))
    model = LossModel(init_from(SPEC, dtype=case.dtype), MemoryConfig())
    made: Any = engines.build(settings, optim, model, ranks)
    made.offloaded.piece = 128
    if engine:
        away = made.offloaded.items
        share = sum(item.gradient.numel() for item in away) / made._grad.numel()
        assert engine["offload_ratio"] - 0.1 < share <= engine["offload_ratio"]
    for step in range(3):
        ids = torch.randint(32, (1, 16), generator=torch.Generator().manual_seed(10 * step + ranks.rank))
        out = made.forward(input_ids=ids, positions=torch.arange(16), labels=ids.roll(-1, 1))
        made.backward(out.loss_sum, last=True)
        made.step(1e-2, float(made.grad_norm()))
    found = {(piece.kind, piece.name): piece.data.clone() for piece in made.fragments()}
    found |= {("parameter", name): tensor.clone() for name, tensor in made.state_for_export()}
    made.close()
    return found


def check_bits(rank: int, world: int, case: Case) -> None:
    ranks = Ranks(rank, world, rank, world, torch.device("cpu"))
    wanted = trained(case, ranks)
    for ratio in case.ratios:
        found = trained(case, ranks, offload_optimizer=True, offload_ratio=ratio)
        assert found.keys() == wanted.keys()
        for key, tensor in wanted.items():
            assert found[key].equal(tensor), f"{ratio}: {key}"


def test_every_share_gives_the_bits_of_the_device(tmp_path: Path) -> None:
    cases = [Case("bfloat16", (0.3, 0.5, 1.0)), Case("float32", (0.3, 1.0)), Case("float64")]
    cases.append(Case("bfloat16", freeze=("*embed_tokens*", "*norm*")))
    failures = run_ranks(2, check_bits, cases, tmp_path / "store")
    assert not failures, "\n".join(f"{case}: {text[0]}" for case, text in failures.items())


def offload(ratio: float) -> dict[str, Any]:
    return {"offload_optimizer": True, "offload_ratio": ratio}


def test_a_run_goes_on_bit_for_bit_with_another_share(
    tmp_path: Path, documents: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of the states on the host, then none, then all of them; against a run that nobody stopped, without any."""
    run = tmp_path / "run"
    for engine, stop in ((offload(0.5), 2), ({}, 6), (offload(1.0), None)):
        with monkeypatch.context() as patched:
            if stop:
                stop_after(patched, stop)
            status = train(config(run, documents, engine=engine))
        assert status == (SAVED_AND_REQUEUE if stop else 0)
    assert losses(run) == losses(undisturbed)
    ends = [load_file(of / "stages/s128/model/model.safetensors") for of in (run, undisturbed)]
    assert all(weight.equal(ends[1][name]) for name, weight in ends[0].items())


def test_zero_takes_over_what_lay_on_the_host(tmp_path: Path, documents: Path, undisturbed: Path) -> None:
    """One process with half of the states on the host, ZeRO-3 on two ranks, and all of them on the host of two."""
    run = tmp_path / "run"
    continued(run, documents, [(1, 1, 0), (2, 1, 3), (2, 2, 0)], [2, 5], [offload(0.5), {}, offload(1.0)])
    assert same(run, undisturbed)


REFUSED = [
    ({"offload_ratio": 0.5}, r"offload_ratio=0.5 is a share of what engine.offload_optimizer=true keeps"),
    ({"name": "deepspeed", "zero": 3, "offload_optimizer": True, "offload_ratio": 0.5}, r"use engine=ddp"),
    ({"offload_parameters": True}, r"offload_parameters=true needs engine=deepspeed"),
]


@pytest.mark.parametrize(("values", "message"), REFUSED)
def test_what_contradicts_itself_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_engine(build(EngineConfig, values, origin="test"), "bfloat16")


@pytest.mark.parametrize("ratio", [0, -0.5, 1.01, "nan", "half"])
def test_a_share_is_above_zero_and_at_most_one(ratio: Any) -> None:
    with pytest.raises(UserError, match="offload_ratio"):
        build(EngineConfig, {"offload_optimizer": True, "offload_ratio": ratio}, origin="test")


@pytest.mark.parametrize(("dtype", "states"), [("bfloat16", 12), ("float32", 8)])
def test_the_plan_moves_the_share_to_the_host(dtype: str, states: int) -> None:
    shape = shape_of_init(SPEC)

    def planned(offloaded: float) -> tuple[float, float, float]:
        found = stage_memory(
            shape, MemoryConfig(), tokens=64, dtype=dtype, zero=0, world=1, ring=0.0, device="cuda", offloaded=offloaded
        )
        return found.gradients, found.optimizer, found.host

    p = shape.parameters
    assert planned(0.0) == (4 * p, states * p, 0)
    assert planned(0.25) == (4 * p, 0.75 * states * p, 0.25 * states * p)
    assert planned(1.0) == (4 * p, 0, states * p)
