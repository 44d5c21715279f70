"""`longctx doctor` reports the libraries' own values, as a document and in words."""

from __future__ import annotations

import json
import os
import platform
import re
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from longctx import doctor
from longctx.attention.kernels import KERNELS
from longctx.config.compose import load
from longctx.config.doctor import DoctorConfig
from longctx.errors import UserError
from longctx.verbs import VERBS

PROJECT = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def found() -> dict:
    return doctor.report(DoctorConfig())


def test_the_machine_is_this_one(found: dict):
    machine = found["machine"]
    assert machine["python"] == platform.python_version()
    assert machine["cores"] == len(os.sched_getaffinity(0))
    total = int(re.findall(r"MemTotal: +(\d+) kB", Path("/proc/meminfo").read_text())[0])
    assert 0 < machine["memory_gib"] <= round(total / 2**20, 1)
    expected = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] or ["cpu"]
    assert machine["devices"] == expected
    assert found["element_wise"].split()[0] in (("liger-kernel", "torch") if torch.cuda.is_available() else ("torch",))
    assert found["backends"] == {"gloo": True, "nccl": torch.distributed.is_nccl_available()}


def test_every_declared_package_has_its_version_and_its_purpose(found: dict):
    extras = PROJECT["optional-dependencies"]
    declared = [*PROJECT["dependencies"], *extras["train"], *extras["gpu"]]
    names = {line.split(">")[0] for line in declared}
    assert names <= set(found["packages"])
    assert not {line.split(">")[0] for line in extras["dev"]} & set(found["packages"])
    assert found["packages"]["torch"] == torch.__version__
    assert found["packages"]["pydantic"] == version("pydantic")
    purpose = doctor.declared_packages()
    assert (purpose["torch"], purpose["wandb"], purpose["flash-attn"]) == ("everything", "train", "gpu")
    assert purpose["gguf"] == "import"  # declared for tests only


def test_the_chosen_kernel_is_the_first_without_a_reason_against_it(found: dict):
    assert list(found["kernels"]) == list(KERNELS)
    assert found["kernel"] == next(name for name, reasons in found["kernels"].items() if not reasons)
    if not torch.cuda.is_available():
        assert found["kernel"] == "torch_cpu"
        assert "needs CUDA tensors, got cpu" in found["kernels"]["flash_attn_2"]
    odd = doctor.report(DoctorConfig(head_dim=20))
    assert any("multiple of 8 up to 256, got 20" in reason for reason in odd["kernels"]["torch_flash"])


def test_words_and_document_say_the_same(
    found: dict, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("COLUMNS", "200")
    assert doctor.run(DoctorConfig(format="json")) == 0
    assert json.loads(capsys.readouterr().out) == found
    assert doctor.run(DoctorConfig()) == 0
    out = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in out.splitlines() if line[:1] == "│"]
    for name, value in found["packages"].items():
        assert [name, value or "not installed", doctor.declared_packages()[name]] in rows
    for name, reasons in found["kernels"].items():
        assert [name, "; ".join(reasons) or "can serve"] in rows
    assert ["memory_gib", str(found["machine"]["memory_gib"])] in rows
    assert f"chosen: {found['kernel']}" in out


@pytest.mark.parametrize("words", [["head_dim=0"], ["heads=6", "kv_heads=4"], ["kv_heads=-1"]])
def test_a_shape_that_no_attention_has_is_refused(words: list[str]):
    with pytest.raises(UserError, match=words[0]):
        load(VERBS["doctor"], words)
