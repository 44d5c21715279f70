"""A rank and its device: the number given to DeepSpeed, bfloat16 units, memory that other processes hold."""

from __future__ import annotations

import os
from dataclasses import replace
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from longctx.attention import ContextParallel, kernels, trial
from longctx.config.model import ModelConfig
from longctx.decide import Decision, Machines
from longctx.distributed.ranks import Ranks
from longctx.errors import UserError
from longctx.shape import shape_of_model
from longctx.train.engine import check_bfloat16
from longctx.train.machine import describe, kernel_of, remark_slow_dtype, room_here
from longctx.train.open_stage import open_context_parallel
from longctx.train.zero import _prepare_deepspeed

from .parity import SHAPE


@pytest.mark.parametrize(("device", "wanted"), [(torch.device("cuda", 0), "0"), (torch.device("cpu"), "1")])
def test_deepspeed_gets_the_ranks_device_for_its_number(monkeypatch, device, wanted):
    """Several ranks may share a device, so the local rank is not a device's number."""
    for name, value in (("LOCAL_RANK", "1"), ("RANK", "1"), ("WORLD_SIZE", "2"), ("DS_ACCELERATOR", "cpu")):
        monkeypatch.setenv(name, value)
    _prepare_deepspeed(Ranks(1, 2, 1, 2, device))
    assert os.environ["LOCAL_RANK"] == wanted
    assert os.environ["DS_ACCELERATOR"] == device.type


def test_a_card_without_bfloat16_units_is_named():
    check_bfloat16((8, 0), "NVIDIA A100")
    check_bfloat16((12, 0), "NVIDIA RTX PRO")
    with pytest.raises(UserError, match=r"Tesla T4 has no bfloat16 units \(compute capability 7\.5"):
        check_bfloat16((7, 5), "Tesla T4")


def test_what_other_processes_hold_on_a_gpu_counts_as_gone(monkeypatch, capsys):
    gib = 2**30
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (30 * gib, 80 * gib))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 2 * gib)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert room_here(Machines(1, 1), "cuda", "cudnn").device_bytes == 32 * gib
    assert "other processes hold 48.0 of the GPU's 80.0 GiB" in "".join(capsys.readouterr())
    assert room_here(Machines(2, 2), "cuda", "cudnn").device_bytes == 32 * gib  # each sees only its own GPU
    monkeypatch.setenv("NCCL_HOSTID", "node0")
    assert room_here(Machines(2, 2), "cuda", "cudnn").device_bytes == 16 * gib  # launch/one_gpu.sh 2
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (77 * gib, 80 * gib))
    capsys.readouterr()
    assert room_here(Machines(8, 8), "cuda", "cudnn").device_bytes == pytest.approx(79 * gib / 8)
    assert "other processes" not in "".join(capsys.readouterr())


@pytest.mark.parametrize("failing", [(), ("flash_attn_4",), ("flash_attn_4", "torch_flash")])
def test_a_rank_names_a_kernel_that_holds_and_never_takes_the_reference_by_itself(monkeypatch, failing):
    """flash-attn 4 and torch's flash attention are there, and some of them fail their trial."""
    serving = ("flash_attn_4", "torch_flash", "reference")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(
        kernels, "explain", lambda _: {name: [] if name in serving else ["is not here"] for name in kernels.KERNELS}
    )
    monkeypatch.setattr(trial, "failure", lambda kernel, _: "it fails here" if kernel.name in failing else "")
    model = ModelConfig(init=SHAPE, dtype="bfloat16")
    shape = shape_of_model(model)
    assert kernel_of(model, shape, "cuda") == "flash_attn_4"  # a launcher does not try
    if len(failing) == 2:
        with pytest.raises(UserError, match=r"no fast attention kernel .*it fails here"):
            describe(model, shape, "cuda")
    else:
        wanted = "torch_flash" if failing else "flash_attn_4"
        assert f"attention kernel {wanted} on cuda" in describe(model, shape, "cuda")
    if failing:
        with pytest.raises(UserError, match=r"attention_kernel=flash_attn_4 cannot serve .*it fails here"):
            kernel_of(replace(model, attention_kernel="flash_attn_4"), shape, "cuda", tried=True)


@pytest.mark.parametrize(("capability", "dtype"), [("AVX2", "bfloat16"), ("AVX2", "float32"), ("AVX512", "bfloat16")])
def test_a_cpu_without_units_for_bfloat16_says_that_float32_is_faster(monkeypatch, capsys, capability, dtype):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr("longctx.console._remarked", set())
    remark_slow_dtype(ModelConfig(init=SHAPE, dtype=dtype), "cpu")
    remark_slow_dtype(ModelConfig(init=SHAPE, dtype=dtype), "cuda")
    slow = (capability, dtype) == ("AVX2", "bfloat16")
    assert capsys.readouterr().err.count("model.dtype=float32 is faster here") == slow


def test_transfers_wait_as_long_as_the_engine_says(monkeypatch):
    """torch does not pass the world's timeout to new groups."""
    asked = {}
    monkeypatch.setattr(dist, "new_group", lambda ranks, timeout: asked.setdefault(tuple(ranks), timeout))
    monkeypatch.setattr(ContextParallel, "from_world", lambda *arguments, **options: options)
    decision = Decision(2, 2, 1, "flat_ring", 1, per_group=1, per_forward=1)
    options, group = open_context_parallel(decision, Ranks(2, 4, 2, 4, torch.device("cpu")), None, 7.0)
    assert asked == {(0, 1): timedelta(seconds=7), (2, 3): timedelta(seconds=7)}
    assert options["timeout"] == 7.0
    assert options["group"] is group
