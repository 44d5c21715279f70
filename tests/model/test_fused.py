"""liger-kernel's operators, held against torch's on a CPU under Triton's interpreter, and how they are chosen.

The interpreter has no bf16 and no libdevice, so bf16 is left to a GPU.
"""

from __future__ import annotations

import importlib
import logging
import os
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor

from longctx.config.model import Fused, MemoryConfig
from longctx.errors import UserError
from longctx.model import LossModel, fused, init_from
from longctx.model import operators as chosen
from longctx.model.norms import _blocks, norm_of_sum
from tests.model.conftest import gradients, sequence, tiny, worst

CPU = torch.device("cpu")
FAMILIES = ["llama", "gemma", "qwen3"]


@pytest.fixture
def _interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """liger-kernel under the interpreter, which lacks floats as tensors and libdevice."""
    if missing := [name for name in ("triton", "liger_kernel") if find_spec(name) is None]:
        pytest.skip(f"not installed: {', '.join(missing)}")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("Triton reads TRITON_INTERPRET=1 while it is imported: launch/liger.sh")
    monkeypatch.setattr(chosen, "HEAD_ROWS", chosen.ROWS)
    language: Any = importlib.import_module("triton.language")
    interpreter: Any = importlib.import_module("triton.runtime.interpreter")
    numpy, convert = importlib.import_module("numpy"), interpreter._implicit_cvt

    def converted(value: Any) -> Any:
        if not isinstance(value, float):
            return convert(value)
        handle = interpreter.TensorHandle(numpy.array([value], dtype=numpy.float32), language.float32)
        return language.tensor(handle, language.float32)

    monkeypatch.setattr(interpreter, "_implicit_cvt", converted)
    norm, added, gelu = (
        importlib.import_module(f"liger_kernel.ops.{name}") for name in ("rms_norm", "fused_add_rms_norm", "geglu")
    )
    for module in (norm, added):
        monkeypatch.setattr(module, "rsqrt", lambda x: language.rsqrt(x))
    monkeypatch.setattr(gelu, "tanh", lambda x: 2 * language.sigmoid(2 * x) - 1)


def made(family: str = "llama", **memory: Any) -> LossModel:
    return LossModel(init_from(tiny(family, layers=1)), MemoryConfig(loss_chunk=10, ffn_block=8, **memory), z_loss=1e-3)


def step(family: str, even: bool = False, **memory: Any) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Loss, z-loss and gradients of two rows with unlabelled tokens and uneven weights, or weights of 1."""
    model = made(family, **memory)
    ids, positions, labels = sequence(12, batch=2)
    labels[:, ::5] = -100
    weights = 0.5 + torch.rand(labels.shape, generator=torch.Generator().manual_seed(2))
    out = model(ids, positions, labels, None if even else weights)
    out.loss_sum.backward()
    return out.loss_sum.detach(), out.z_sum, gradients(model)


@pytest.mark.usefixtures("_interpreted")
@pytest.mark.parametrize(
    ("family", "memory"),
    [
        ("llama", {"keep_matmuls": 1}),
        ("llama", {"even": True}),
        ("qwen3", {}),
        ("gemma", {"activation_checkpointing": False}),
    ],
)
def test_ligers_kernels_equal_the_operators(family: str, memory: dict[str, Any]) -> None:
    """One layer keeps its products: kernels that overwrite their inputs must not change them."""
    loss, z, grads = step(family, fused="off", **memory)
    other, other_z, others = step(family, fused="liger", **memory)
    assert not torch.equal(loss, other) or worst(others, grads) > 0, "liger-kernel did not run"
    assert other == pytest.approx(float(loss), rel=1e-6)
    assert other_z == pytest.approx(float(z), rel=1e-5)
    assert worst(others, grads) < 1e-5


@pytest.mark.usefixtures("_interpreted")
@pytest.mark.parametrize("added", [False, True])
def test_ligers_norm_adds_to_an_accumulator(added: bool) -> None:
    """Blocks of bfloat16 add up in fp32, as with torch's operators."""
    x, y = torch.randn(5, 32, requires_grad=True), torch.randn(5, 32) if added else None
    weight: Any = torch.nn.Parameter(torch.randn(32))

    def backward() -> None:
        for block in (0, 1):
            norm_of_sum("liger", x * (block + 1), y, weight, 1e-6, False)[1].square().sum().backward()

    backward()
    expected, weight.grad, weight.main_grad = weight.grad, None, torch.zeros(32)
    backward()
    assert weight.grad is None
    assert torch.equal(weight.main_grad, expected)


@pytest.mark.usefixtures("_interpreted")
@pytest.mark.parametrize("family", FAMILIES)
def test_auto_takes_liger_where_it_agrees(family: str, caplog: pytest.LogCaptureFixture) -> None:
    assert chosen.choose("auto", made(family).model.model, CPU) == "liger"  # type: ignore[arg-type, union-attr]
    assert not caplog.records


@pytest.mark.usefixtures("_interpreted")
@pytest.mark.parametrize(
    "where", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)],
    ids=["no_grad", "inference_mode", "autocast"],
)  # fmt: skip
@pytest.mark.filterwarnings("error")
def test_the_trial_does_not_depend_on_where_the_first_pass_runs(where: Any, caplog: pytest.LogCaptureFixture) -> None:
    """The first pass may be an evaluation, or run under Trainer's bf16."""
    with where():
        assert chosen.choose("auto", made().model.model, CPU) == "liger"  # type: ignore[arg-type, union-attr]
    assert not caplog.records


@pytest.mark.usefixtures("_interpreted")
def test_another_dtype_or_device_is_another_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model trained in fp32 on a GPU generates on a CPU afterwards, or is evaluated in fp64."""
    model: Any = made()
    ids, positions, labels = sequence(8)
    model(ids, positions, labels)
    norm = model.model.model.norm
    assert norm.operators == "liger"
    x = torch.randn(3, 32, requires_grad=True)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert "_RmsNorm" in str(norm(x).grad_fn.next_functions[0])
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "LigerNorm" in str(norm(x).grad_fn.next_functions[0])
    model.double()(ids, positions, labels)
    assert norm.operators == "torch"


@pytest.mark.usefixtures("_interpreted")
@pytest.mark.parametrize(
    ("kernel", "name"),
    [("liger_rotate", "rotation"), ("liger_gated", "activation"), ("liger_loss", "loss"), ("LigerNorm", "norm")],
)
def test_a_kernel_that_is_wrong_or_fails_is_not_taken(
    kernel: str, name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A factor of 1.001 in a gradient is more than rounding in fp32; a missing function is another version's."""
    backbone: Any = made().model.model  # type: ignore[union-attr]
    caplog.set_level(logging.WARNING)
    right = fused.liger_loss if kernel == "liger_loss" else None

    def failing(*args: Any) -> Any:
        raise TypeError("rms_norm_forward() takes 4 positional arguments")

    def wrong(logits: Tensor, label: Tensor, z_loss: float) -> Any:
        found = right(logits, label, z_loss)  # type: ignore[misc]
        logits.mul_(1.001)
        return found

    place = {"liger_loss": "loss", "liger_rotate": "rotary", "liger_gated": "feed_forward", "LigerNorm": "norms"}[
        kernel
    ]
    broken = type("Broken", (), {"apply": failing}) if kernel == "LigerNorm" else wrong if right else failing
    monkeypatch.setattr(f"longctx.model.{place}.{kernel}", broken)
    assert chosen.choose("auto", backbone, CPU) == "torch"
    said = caplog.records[-1].getMessage()
    assert f"liger-kernel's {name} " in said
    assert ("from torch's" if right else "TypeError: rms_norm_forward") in said
    with pytest.raises(UserError, match=rf"fused=liger: liger-kernel's {name} .*model.memory.fused=off"):
        chosen.choose("liger", backbone, CPU)


@pytest.mark.usefixtures("_interpreted")
@pytest.mark.parametrize(("summed", "name"), [(False, "norm of the residual"), (True, "norm of a sum")])
def test_each_way_of_the_norm_is_tried(summed: bool, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient that passes through is 1.001 of the right one, with an addend or without."""

    def apply(x: Tensor, addend: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
        total, normed = fused.LigerNorm.apply(x, addend, *rest)
        return (total + 1e-3 * (total - total.detach()) if (addend is not None) == summed else total), normed

    monkeypatch.setattr("longctx.model.norms.LigerNorm", type("Wrong", (), {"apply": staticmethod(apply)}))
    backbone: Any = made().model.model  # type: ignore[union-attr]
    assert f"liger-kernel's {name} is " in chosen.against_liger(backbone, CPU)


@pytest.mark.usefixtures("_interpreted")
@pytest.mark.parametrize("gelu", [False, True])
def test_a_second_backward_pass_through_the_activation_is_refused(gelu: bool) -> None:
    """Its gradient would be one of gradients: the first pass has written them over gate and up."""
    gate, up = (torch.randn(1, 4, 32, requires_grad=True) for _ in range(2))
    total = fused.liger_gated(gate * 1.0, up * 1.0, gelu).sum()
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"modified.* inplace"):
        total.backward()


def test_a_cpu_and_fp64_take_torchs_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    names: list[Fused] = ["auto", "liger", "off"]
    backbone: Any = made().model.model  # type: ignore[union-attr]
    assert {chosen.choose(name, backbone, CPU) for name in names} == {"torch"}
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # which makes a CPU a GPU here
    backbone.double()
    assert {chosen.choose(name, backbone, CPU) for name in names} == {"torch"}


def test_a_gpu_without_liger_is_told_what_it_misses(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(chosen, "find_spec", lambda name: None)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    caplog.set_level(logging.WARNING)
    backbone: Any = made().model.model  # type: ignore[union-attr]
    assert chosen.choose("auto", backbone, CPU) == "torch"
    assert "liger-kernel is not installed" in caplog.records[-1].getMessage()
    assert "install longctx[gpu]" in caplog.records[-1].getMessage()
    with pytest.raises(UserError, match=r"fused=liger needs the package liger-kernel.* install longctx.gpu."):
        LossModel(init_from(tiny()), MemoryConfig(fused="liger"))


def test_norms_take_few_blocks_on_a_gpu() -> None:
    """The meta device replaces a GPU: 65,536 rows of 4,096 are 4 blocks there, and 64 on a CPU."""
    x = torch.empty(65536, 4096, device="meta")
    assert len(_blocks(x)) == 4
    assert len(_blocks(torch.empty(65536, 1))) == 64
