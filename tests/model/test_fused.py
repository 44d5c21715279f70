"""The candidates for element-wise work on a GPU, held against torch's operators on a CPU.

compile runs here without a code generator (the backend "eager"), liger-kernel under Triton's interpreter where both are
installed. The interpreter has no bf16 and no libdevice, so bf16 is left to a GPU.
"""

from __future__ import annotations

import importlib
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor

from longctx.config.model import Fused, MemoryConfig
from longctx.errors import UserError
from longctx.model import LossModel, fused, init_from
from longctx.model.norms import _blocks
from tests.model.conftest import gradients, sequence, tiny, worst
from tests.watch import Watch


@pytest.fixture
def _candidates_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(fused, "BACKEND", "eager")
    fused.compiled.cache_clear()


@pytest.fixture
def _interpreted_liger(_candidates_on_a_cpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """liger-kernel under the interpreter, which lacks floats as tensors and libdevice."""
    if missing := [name for name in ("triton", "liger_kernel") if find_spec(name) is None]:
        pytest.skip(f"not installed: {', '.join(missing)}")
    language: Any = importlib.import_module("triton.language")
    interpreter: Any = importlib.import_module("triton.runtime.interpreter")
    numpy, convert = importlib.import_module("numpy"), interpreter._implicit_cvt

    def converted(value: Any) -> Any:
        if not isinstance(value, float):
            return convert(value)
        handle = interpreter.TensorHandle(numpy.array([value], dtype=numpy.float32), language.float32)
        return language.tensor(handle, language.float32)

    monkeypatch.setattr(interpreter, "_implicit_cvt", converted)
    norm, gelu = (importlib.import_module(f"liger_kernel.ops.{name}") for name in ("rms_norm", "geglu"))
    monkeypatch.setattr(norm, "rsqrt", lambda x: language.rsqrt(x))
    monkeypatch.setattr(gelu, "tanh", lambda x: 2 * language.sigmoid(2 * x) - 1)


def step(family: str, memory: MemoryConfig) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Loss, z-loss and gradients of two rows with unlabelled tokens and uneven weights."""
    model = LossModel(init_from(tiny(family)), memory, z_loss=1e-3)
    ids, positions, labels = sequence(48, batch=2)
    labels[:, ::5] = -100
    weights = 0.5 + torch.rand(labels.shape, generator=torch.Generator().manual_seed(2))
    out = model(ids, positions, labels, weights)
    out.loss_sum.backward()
    return out.loss_sum.detach(), out.z_sum, gradients(model)


def assert_equal_steps(family: str, candidate: Fused, **dials: Any) -> None:
    loss, z, grads = step(family, MemoryConfig(loss_chunk=16, ffn_block=32, fused="off", **dials))
    other, other_z, others = step(family, MemoryConfig(loss_chunk=16, ffn_block=32, fused=candidate, **dials))
    assert not torch.equal(loss, other) or worst(others, grads) > 0, "the candidate did not run"
    assert other == pytest.approx(float(loss), rel=1e-6)
    assert other_z == pytest.approx(float(z), rel=1e-5)
    assert worst(others, grads) < 1e-5


@pytest.mark.usefixtures("_candidates_on_a_cpu")
@pytest.mark.parametrize("family", ["llama", "gemma", "qwen3"])
def test_compiled_formulas_equal_the_operators(family: str) -> None:
    assert_equal_steps(family, "compile", keep_matmuls=1)


@pytest.mark.usefixtures("_interpreted_liger")
@pytest.mark.parametrize("family", ["llama", "gemma", "qwen3"])
def test_ligers_kernels_equal_the_operators(family: str) -> None:
    """One layer keeps its products: kernels that overwrite their inputs must not change them."""
    assert_equal_steps(family, "liger", keep_matmuls=1)


@pytest.mark.usefixtures("_candidates_on_a_cpu")
def test_a_formula_is_compiled_under_a_dispatch_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs: list[Any] = []
    monkeypatch.setattr(fused, "BACKEND", lambda graph, inputs: graphs.append(graph) or graph.forward)
    with Watch():
        out = fused.compiled(fused.gated)(torch.ones(3, 4), torch.ones(3, 4), False)
    assert len(graphs) == 1
    assert torch.equal(out, torch.nn.functional.silu(torch.ones(3, 4)))
    fused.compiled.cache_clear()


def test_on_a_cpu_and_in_fp64_every_candidate_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    assert fused.chosen("liger", torch.ones(1)) == "off"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert fused.chosen("liger", torch.ones(1)) == "liger"
    assert fused.chosen("liger", torch.ones(1, dtype=torch.float64)) == "off"
    assert fused.chosen("auto", torch.ones(1)) == "off"


def test_a_candidate_that_is_not_installed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"fused=liger needs the package liger-kernel.* take compile or off"):
        LossModel(init_from(tiny()), MemoryConfig(fused="liger"))


def test_norms_take_few_blocks_on_a_gpu() -> None:
    """The meta device replaces a GPU: 65,536 rows of 4,096 are 4 blocks there, and 64 on a CPU."""
    x = torch.empty(65536, 4096, device="meta")
    assert len(_blocks(x)) == 4
    assert len(_blocks(torch.empty(65536, 1))) == 64
