"""The bytes that a step's element-wise work reads and writes, counted on fake tensors at the sizes of a real model.

A dispatch mode adds up the inputs and outputs of every operator that is neither a view nor a matrix product nor
attention: on a GPU such work takes these bytes over the memory's bandwidth. liger-kernel's kernels are replaced by
functions of the same names that allocate their results and count what the kernels read and write.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from longctx.config.model import InitConfig, MemoryConfig
from longctx.model import LossModel, init_from, set_rope
from longctx.model import wrapper as wrapped

LAYERS, TOKENS, HIDDEN, HEADS, KV, FFN, VOCAB = 2, 16384, 4096, 32, 8, 14336, 128256
VIEWS = {
    "t", "detach", "_unsafe_view", "view", "reshape", "as_strided", "transpose", "split", "slice", "select", "expand",
    "unsqueeze", "squeeze", "empty", "permute", "alias", "unbind", "new_empty", "empty_like", "split_with_sizes",
}  # fmt: skip
PRODUCTS = ("aten.mm", "aten.addmm", "longctx.")


def size(*values: Any) -> int:
    return sum(value.numel() * value.element_size() for value in tree_iter(values) if isinstance(value, Tensor))


class Traffic(TorchDispatchMode):
    """Adds up bytes and launches, by operator."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: dict[str, int] = {}
        self.launches = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        name = str(func)
        if name.split(".")[1] not in VIEWS and not name.startswith(("prim", *PRODUCTS)):
            read = 0 if "zero" in name or "fill" in name else size(args[1:2] if ".copy_" in name else (args, kwargs))
            self.add(name, read + size(made))
        return made

    def add(self, name: str, count: int) -> None:
        self.bytes[name] = self.bytes.get(name, 0) + count
        self.launches += 1

    @property
    def total(self) -> int:
        return sum(self.bytes.values())


def kernels(traffic: Traffic) -> dict[str, ModuleType]:
    """Modules with liger-kernel's names."""

    def empty_norm(x: Tensor, *_: Any) -> tuple[Any, ...]:
        traffic.add("norm", 2 * size(x))
        return torch.empty_like(x), x, x.new_empty(len(x)), 0, 0, 0

    def empty_norm_backward(grad: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        traffic.add("norm backward", 3 * size(grad))
        return grad, grad.new_empty(grad.shape[1])

    def empty_sum_norm(x: Tensor, *_: Any) -> tuple[Any, ...]:
        traffic.add("norm", 4 * size(x))
        return torch.empty_like(x), torch.empty_like(x), x.new_empty(len(x)), 0, 0, 0, 0

    def empty_sum_norm_backward(grad: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
        traffic.add("norm backward", 4 * size(grad))
        return grad, grad, grad.new_empty(grad.shape[1])

    class Rotate(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
            traffic.add("rotation", 2 * size(q, k) + size(cos, sin))
            return q.view_as(q), k.view_as(k)

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Any:
            traffic.add("rotation backward", 2 * size(grads))
            return *grads, None, None

    class Gated(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
            ctx.save_for_backward(gate, up)
            traffic.add("activation", 3 * size(gate))
            return torch.empty_like(gate)

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Any:
            traffic.add("activation backward", 5 * size(grads))
            return ctx.saved_tensors

    class Kernel:
        def __getitem__(self, grid: Any) -> Any:
            return lambda X_ptr, **_: traffic.add("softmax", 3 * size(X_ptr))  # two passes read, the second writes

    found = {
        "rms_norm": {"rms_norm_forward": empty_norm, "rms_norm_backward": empty_norm_backward},
        "fused_add_rms_norm": {"fused_add_rms_norm_forward": empty_sum_norm,
                               "fused_add_rms_norm_backward": empty_sum_norm_backward},
        "rope": {"LigerRopeFunction": Rotate}, "swiglu": {"LigerSiLUMulFunction": Gated},
        "geglu": {"LigerGELUMulFunction": Gated}, "cross_entropy": {"liger_cross_entropy_kernel": Kernel()},
    }  # fmt: skip
    made = {"liger_kernel": ModuleType("liger_kernel"), "liger_kernel.ops": ModuleType("liger_kernel.ops")}
    for name, content in found.items():
        made[f"liger_kernel.ops.{name}"] = ModuleType(name)
        vars(made[f"liger_kernel.ops.{name}"]).update(content)
        setattr(made["liger_kernel.ops"], name, made[f"liger_kernel.ops.{name}"])
    return made


@pytest.fixture
def traffic(monkeypatch: pytest.MonkeyPatch) -> Traffic:
    """A counter, in a process where a GPU's products add to their sums and liger-kernel is what `kernels` makes."""
    found = Traffic()
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # which makes a CPU a GPU here
    for name, module in kernels(found).items():
        monkeypatch.setitem(sys.modules, name, module)
    for place in ("loss", "products"):
        monkeypatch.setattr(f"longctx.model.{place}.add_product", lambda total, a, b: None)
    monkeypatch.setattr("longctx.model.products.add_input_gradient", lambda total, grad, weight: total)
    return found


def counted(traffic: Traffic, monkeypatch: pytest.MonkeyPatch, operators: str, **memory: Any) -> Traffic:
    """Forward and backward pass of one sequence of Llama-3-8B's shape with two layers, bfloat16."""
    monkeypatch.setattr(wrapped, "choose", lambda *_: operators)
    spec = InitConfig(layers=LAYERS, hidden=HIDDEN, heads=HEADS, kv_heads=KV, ffn=FFN, vocab=VOCAB, window=8192)
    with FakeTensorMode(allow_non_fake_inputs=True):
        plain = init_from(spec, dtype="bfloat16")
        model = LossModel(plain, MemoryConfig(ffn_block=8192, loss_chunk=4096, **memory))
        with unset_fake_temporarily():
            set_rope(plain, {"rope_type": "default", "rope_theta": 500000.0}, TOKENS)
            labelled = torch.arange(TOKENS - 1).numpy()
        ids = torch.zeros(1, TOKENS, dtype=torch.long)
        labels = torch.cat([ids[:, 1:], ids.new_full((1, 1), -100)], dim=1)
        with traffic:
            model(ids, torch.arange(TOKENS), labels, targets=labelled).loss_sum.backward()
    return traffic


def test_fused_work_moves_little_more_than_its_operands(traffic: Traffic, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counts tensors that are read or written once, over forward pass, recomputation and backward pass.

    Of a layer, in bfloat16 tensors of tokens x width: norms 2 + 4 in the forward pass, the same again, and 4 + 4
    backward; the residual's sum 3; the blocks joined 2, and the gradients of their two inputs 4; the rotation twice 2
    and backward 2; the activation twice 3 and backward 5. Of the end: the softmax 3 of the logits. Of weights, in bytes
    an element: sums over blocks 4 to clear and 6 to round, the head's sum as well and 4 to scale, the embedding 4.
    """
    counted(traffic, monkeypatch, "liger")
    hidden, turned = 2 * TOKENS * HIDDEN, 2 * TOKENS * (HIDDEN + KV * HIDDEN // HEADS)
    wide, logits = 2 * TOKENS * FFN, 2 * (TOKENS - 1) * VOCAB
    layer = (2 * (2 + 4) + 4 + 4 + 3 + 2 + 4) * hidden + 3 * 2 * turned + (2 * 3 + 5) * wide
    weights = (4 + 6) * LAYERS * (3 * HIDDEN * FFN + HIDDEN * HIDDEN) + (4 + 6 + 4 + 4) * VOCAB * HIDDEN
    assert traffic.total == pytest.approx(LAYERS * layer + 3 * logits + weights, rel=0.05)
    assert traffic.launches < 100 * LAYERS


def test_torchs_operators_move_four_times_as_much(traffic: Traffic, monkeypatch: pytest.MonkeyPatch) -> None:
    fused = counted(traffic, monkeypatch, "liger").total
    traffic.bytes.clear()
    assert counted(traffic, monkeypatch, "torch").total > 3.5 * fused


def test_labels_side_by_side_are_not_gathered(traffic: Traffic, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sequence's last token has no label, so its labels are slices of it, which need no copy."""
    counted(traffic, monkeypatch, "liger")
    assert not any("aten.index." in name for name in traffic.bytes)


def test_products_that_are_kept_are_copied_before_they_are_turned(
    traffic: Traffic, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted(traffic, monkeypatch, "liger")
    assert "aten.clone.default" not in traffic.bytes
    counted(traffic, monkeypatch, "liger", keep_matmuls=LAYERS)
    assert traffic.bytes["aten.clone.default"] > 0
