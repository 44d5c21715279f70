"""A GPU's kernel is tried before it serves: one that fails or errs is told by its call and passed over, and said so."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from longctx.attention import kernels, trial
from longctx.attention.kernel import Kernel, Problem, Varlen
from longctx.attention.kernels import KERNELS, choose, explain, serving
from longctx.errors import UserError
from tests.attention.packed_kernel import PackedKernel

HERE = Problem("cpu", torch.float32, 16, 8, 2)
H100 = Problem("cuda", torch.bfloat16, 128, 32, 8, (9, 0))


def changed(what: str, *, packed: bool) -> Kernel:
    """A right kernel with a fault in its dense or its packed calls."""
    right = PackedKernel().kernel()
    assert right.varlen is not None

    def forward(*given: Any, **options: Any) -> Any:
        if what == "raises":
            raise TypeError("_flash_attn_fwd() got an unexpected keyword\nand more")
        if what == "wrong mask":
            options["causal"] = False
        out, lse = (right.varlen.forward if packed else right.forward)(*given, **options)
        if what == "lse in log2":
            return out, lse / 0.6931
        return out, lse

    def backward(*given: Any, **options: Any) -> Any:
        dq, dk, dv = (right.varlen.backward if packed else right.backward)(*given, **options)
        if what == "dq of another shape":
            dq = dq.transpose(-1, -2)
        if what == "dv in part":
            dv = dv.clone()
            dv[..., -8:] = 0
        return dq, dk * (1.05 if what == "dk too large" else float("nan") if what == "dk is NaN" else 1), dv

    return (
        replace(right, varlen=Varlen(forward, backward))
        if packed
        else replace(right, forward=forward, backward=backward)
    )


def test_right_kernels_hold() -> None:
    assert trial.tried(KERNELS["torch_cpu"], HERE) == ""
    assert trial.tried(PackedKernel().kernel(), HERE) == ""
    assert trial.tried(PackedKernel().kernel(), replace(HERE, q_heads=1, kv_heads=1)) == ""
    rounded = replace(HERE, dtype=torch.bfloat16)
    assert trial.tried(KERNELS["reference"], rounded) == ""  # with the rounding of a narrow type


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("raises", r"it fails here \(TypeError: _flash_attn_fwd\(\) got an unexpected keyword\)$"),
        ("wrong mask", "gives out at a distance of"),
        ("lse in log2", "gives lse at a distance of 4"),
        ("dq of another shape", r"gives dq of shape \("),
        ("dk too large", r"gives dk at a distance of 5.0e-02 from the reference \(bar 0.03\)"),
        ("dk is NaN", "gives dk at a distance of nan"),
        ("dv in part", "gives dv at a distance of"),
    ],
)
def test_what_is_wrong_is_told_by_its_call(what: str, said: str, packed: bool) -> None:
    found = trial.tried(changed(what, packed=packed), HERE)
    assert re.search(said, found), found
    assert what == "raises" or found.startswith("its packed call" if packed else "its causal call"), found


@pytest.fixture
def fails(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[str]]:
    """The kernels that fail their trial, on a card with flash-attn 3 and 4 and cuDNN."""
    for name in ("flash_attn_3", "flash_attn_4", "cudnn"):
        monkeypatch.setitem(KERNELS, name, replace(KERNELS[name], unsupported_reasons=lambda problem: []))
    found: set[str] = set()
    monkeypatch.setattr(kernels, "failure", lambda kernel, _: "it fails here" if kernel.name in found else "")
    forget()
    yield found
    forget()


def forget() -> None:
    for kept in (choose, serving, kernels._serves):
        kept.cache_clear()


def test_a_kernel_that_fails_is_passed_over_and_said_once(fails: set[str], caplog: pytest.LogCaptureFixture) -> None:
    fails |= {"flash_attn_3", "cudnn"}
    caplog.set_level(logging.WARNING, "longctx.attention")
    assert [choose(H100).name, choose(H100).name] == ["flash_attn_4"] * 2
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith("attention kernel flash_attn_3 is passed over: it fails here; `longctx doctor`")
    with pytest.raises(
        UserError, match=r"flash_attn_3 was asked for and cannot be relied on here: it fails here; .*=auto"
    ):
        choose(H100, "flash_attn_3")
    found = explain(H100, tried=True)
    assert (found["flash_attn_3"], found["cudnn"], found["torch_flash"]) == (["it fails here"], ["it fails here"], [])
    assert explain(H100)["flash_attn_3"] == []


def test_what_a_kernel_leaves_goes_to_kernels_that_hold(fails: set[str]) -> None:
    """A kernel with packed calls leaves nothing."""
    assert [kernel.name for kernel in serving(H100)] == ["flash_attn_3"]
    assert [kernel.name for kernel in serving(H100, "cudnn")] == ["cudnn", "flash_attn_3"]
    fails |= {"flash_attn_3", "flash_attn_4"}
    forget()
    assert [kernel.name for kernel in serving(H100)] == ["cudnn", "torch_flash"]


def test_only_a_gpu_of_this_process_tries(monkeypatch: pytest.MonkeyPatch) -> None:
    tries: list[str] = []
    monkeypatch.setattr(trial, "tried", lambda kernel, problem: tries.append(kernel.name) or "no")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert trial.failure(KERNELS["torch_flash"], H100) == ""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert trial.failure(KERNELS["torch_cpu"], HERE) == ""
    assert trial.failure(KERNELS["reference"], H100) == ""
    trial._failure.cache_clear()
    assert [trial.failure(KERNELS["torch_flash"], H100) for _ in range(2)] == ["no", "no"]
    assert tries == ["torch_flash"]
    trial._failure.cache_clear()


def test_a_full_card_says_nothing_of_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(problem: Problem) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(trial, "_drawn", full)
    assert trial.tried(KERNELS["torch_cpu"], HERE) == ""
