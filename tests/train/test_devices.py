"""A rank and its device: the number given to DeepSpeed, bfloat16 units, memory that other processes hold."""

from __future__ import annotations

import os
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from longctx.attention import ContextParallel
from longctx.decide import Decision, Machines
from longctx.distributed.ranks import Ranks
from longctx.errors import UserError
from longctx.train.engine import check_bfloat16
from longctx.train.machine import room_here
from longctx.train.open_stage import open_context
from longctx.train.zero import _prepare_deepspeed


@pytest.mark.parametrize(("device", "wanted"), [(torch.device("cuda", 0), "0"), (torch.device("cpu"), "1")])
def test_deepspeed_gets_the_ranks_device_for_its_number(monkeypatch, device, wanted):
    """Several ranks may share a device, so the local rank is not a device's number."""
    for name, value in (("LOCAL_RANK", "1"), ("RANK", "1"), ("WORLD_SIZE", "2"), ("DS_ACCELERATOR", "cpu")):
        monkeypatch.setenv(name, value)
    _prepare_deepspeed(Ranks(1, 2, 1, 2, device))
    assert os.environ["LOCAL_RANK"] == wanted


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
    assert room_here(Machines(2, 2), "cuda", "cudnn").device_bytes == 16 * gib  # launch/one_gpu.sh 2
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (77 * gib, 80 * gib))
    capsys.readouterr()
    assert room_here(Machines(8, 8), "cuda", "cudnn").device_bytes == pytest.approx(79 * gib / 8)
    assert "other processes" not in "".join(capsys.readouterr())


def test_transfers_wait_as_long_as_the_engine_says(monkeypatch):
    """torch does not pass the world's timeout to new groups."""
    asked = {}
    monkeypatch.setattr(dist, "new_group", lambda ranks, timeout: asked.setdefault(tuple(ranks), timeout))
    monkeypatch.setattr(ContextParallel, "from_world", lambda *arguments, **options: options)
    decision = Decision(2, 2, 1, "flat_ring", 1, per_group=1, per_forward=1)
    options, group = open_context(decision, Ranks(2, 4, 2, 4, torch.device("cpu")), None, 7.0)
    assert asked == {(0, 1): timedelta(seconds=7), (2, 3): timedelta(seconds=7)}
    assert options["timeout"] == 7.0
    assert options["group"] is group
