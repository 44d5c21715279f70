"""What a rank does about its device: DeepSpeed's number for it, bfloat16 units, the age of torch."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
import torch

from longctx import versions
from longctx.cli import main
from longctx.distributed.ranks import Ranks
from longctx.errors import UserError
from longctx.train.engine import check_bfloat16
from longctx.train.zero import _prepare_deepspeed


@pytest.mark.parametrize(("device", "wanted"), [(torch.device("cuda", 0), "0"), (torch.device("cpu"), "1")])
def test_deepspeed_gets_the_ranks_device_for_its_number(monkeypatch, device, wanted):
    """Several ranks may share a device, so the local rank is not a device's number."""
    for name, value in (("LOCAL_RANK", "1"), ("RANK", "1"), ("WORLD_SIZE", "2"), ("DS_ACCELERATOR", "cpu")):
        monkeypatch.setenv(name, value)
    _prepare_deepspeed(Ranks(1, 2, 1, 2, device))
    import os

    assert os.environ["LOCAL_RANK"] == wanted


def test_a_card_without_bfloat16_units_is_named():
    check_bfloat16((8, 0), "NVIDIA A100")
    check_bfloat16((12, 0), "NVIDIA RTX PRO")
    with pytest.raises(UserError, match=r"Tesla T4 has no bfloat16 units \(compute capability 7\.5"):
        check_bfloat16((7, 5), "Tesla T4")


def test_a_torch_that_is_too_old_is_said_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr(versions, "version", lambda name: "2.10.1+cu128")
    assert main(["theta", "--help"]) == 2
    said = capsys.readouterr().err.strip()
    assert said == "longctx: torch 2.10.1+cu128 is older than longctx needs: pip install 'torch>=2.11' (pyproject.toml)"
    for fine in ("2.11.0+cu130", "2.13.0", "3.0.0a0"):
        monkeypatch.setattr(versions, "version", lambda name, fine=fine: fine)
        versions.check_torch()


def test_the_oldest_torch_is_the_one_that_the_project_declares():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    declared = next(line for line in project["dependencies"] if line.startswith("torch>"))
    assert tuple(map(int, re.findall(r"\d+", declared))) == versions.TORCH_MINIMUM
