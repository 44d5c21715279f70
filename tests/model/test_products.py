"""Products that share an input, and gradients that are added where they belong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from longctx.config.model import MemoryConfig
from longctx.model import LossModel, init_from
from longctx.model.norms import TrainedNorm, prepare_norms
from longctx.model.products import BlockSums, project
from longctx.planner.memory import _block_gradients
from tests.model.conftest import main_grads, sequence, tiny

TOKENS = 1024


def grads_of(outputs: tuple[Tensor, ...], x: Tensor, modules: nn.ModuleList) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    given = [torch.randn(out.shape, generator=generator).to(out.dtype) for out in outputs]
    return list(torch.autograd.grad(outputs, [x, *modules.parameters()], given))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bias", [False, True])
def test_joined_projections_have_the_bits_of_separate_ones(dtype: torch.dtype, bias: bool) -> None:
    modules = nn.ModuleList(nn.Linear(24, width, bias=bias, dtype=dtype) for width in (40, 16, 16))
    x = torch.randn(2, 33, 24, dtype=dtype, requires_grad=True)
    joined, separate = project(x, *modules), tuple(module(x) for module in modules)
    assert all(map(torch.equal, joined, separate))
    assert all(map(torch.equal, grads_of(joined, x, modules), grads_of(separate, x, modules)))


@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_a_frozen_weight_gets_no_gradient_and_the_others_keep_theirs(frozen: int) -> None:
    modules = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
    modules[frozen].requires_grad_(False)
    x = torch.randn(5, 8, requires_grad=True)
    for run in (project(x, *modules), tuple(module(x) for module in modules)):
        sum(out.square().sum() for out in run).backward()  # type: ignore[union-attr]
        found = [weight.grad for module in modules for weight in module.parameters()]
        assert [grad is None for grad in found] == [place == frozen for place in range(3) for _ in range(2)]


def test_a_module_that_is_more_than_its_product_is_called() -> None:
    class Twice(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    hooked, own, x = nn.Linear(4, 4), nn.Linear(4, 4), torch.ones(3, 4)
    hooked.register_forward_hook(lambda module, args, out: out + 1)
    own.forward = lambda input: 3 * input  # type: ignore[method-assign]
    for module in (Twice(4, 4), hooked, own):
        assert torch.equal(project(x, module)[0], module(x))


@pytest.mark.parametrize(
    "register",
    ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook",
     "register_full_backward_pre_hook"],
)  # fmt: skip
def test_hooks_of_every_module_of_a_layer_run(register: str) -> None:
    """ZeRO-3 without leaf modules and FSDP gather a module's weights in them."""
    model = init_from(tiny("qwen3", layers=1))
    prepared, called = LossModel(model, MemoryConfig(activation_checkpointing=False)), set()
    parts = {name: part for name, part in model.model.layers[0].named_modules() if list(part.parameters(recurse=False))}
    for name, part in parts.items():
        getattr(part, register)(lambda *_, name=name: called.add(name))
    prepared(*sequence(16)).loss_sum.backward()
    assert called == set(parts)


def test_an_adapter_around_a_norm_is_called() -> None:
    from peft import LNTuningConfig, get_peft_model

    plain = init_from(tiny())
    exact = LossModel(init_from(tiny()), MemoryConfig())(*sequence(16)).loss_sum
    names = ["input_layernorm", "post_attention_layernorm", "norm"]
    tuned = get_peft_model(plain, LNTuningConfig(target_modules=names))
    loss = LossModel(tuned, MemoryConfig())(*sequence(16)).loss_sum
    loss.backward()
    assert torch.equal(loss, exact)
    assert {name.rsplit(".", 4)[-4] for name, weight in tuned.named_parameters() if weight.grad is not None} == set(
        names
    )


def step(dtype: torch.dtype, accumulated: bool, *, family: str = "llama", **memory: int | bool) -> dict[str, Tensor]:
    """The gradients in fp64 of a model drawn in bfloat16, computed in `dtype`."""
    hf = init_from(tiny(family, hidden=64, ffn=172, window=TOKENS), dtype="bfloat16").to(dtype)
    model = LossModel(hf, MemoryConfig(**memory), z_loss=1e-3)  # type: ignore[arg-type]
    made = main_grads(model) if accumulated else {}
    ids, positions, labels = sequence(TOKENS)
    (model(ids, positions, labels).loss_sum / TOKENS).backward()
    assert not accumulated or all(weight.grad is None for weight in model.parameters())
    return {name: made.get(name, weight.grad).double() for name, weight in model.named_parameters()}  # type: ignore[arg-type, union-attr]


def errors(found: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    """The mean relative L2 distance of feed-forward weights, of norms and of the head."""
    groups: dict[str, Callable[[str], bool]] = {
        "mlp": lambda name: "mlp" in name, "norm": lambda name: "post_attention" in name,
        "head": lambda name: "lm_head" in name,
    }  # fmt: skip
    distance = {name: ((found[name] - exact[name]).norm() / exact[name].norm()).item() for name in exact}
    means = {}
    for group, holds in groups.items():
        kept = [value for name, value in distance.items() if holds(name)]
        means[group] = sum(kept) / len(kept)
    return means


@pytest.mark.parametrize("accumulated", [False, True])
def test_blocks_cost_bfloat16_gradients_no_digits(accumulated: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    exact = step(torch.float64, False)
    whole, blocks = (errors(step(torch.bfloat16, accumulated, ffn_block=size), exact) for size in (0, 16))
    assert blocks["mlp"] < (1.03 if accumulated else 1.05) * whole["mlp"]  # without, the sum is rounded too
    monkeypatch.setattr(BlockSums, "add", lambda sums, key, grad, x: grad.t() @ x)  # autograd's sum of 64 blocks
    narrow = errors(step(torch.bfloat16, False, ffn_block=16), exact)
    assert narrow["mlp"] > 1.15 * blocks["mlp"]
    if accumulated:
        assert blocks["norm"] < 1.03 * whole["norm"] < narrow["norm"]
        assert blocks["head"] < narrow["head"]


def test_the_plan_holds_the_sums_of_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of gate, up, down and o_proj, in fp32; the last block adds one narrow copy at a time."""
    held, add = [], BlockSums.add

    def watched(sums: BlockSums, *given: Any) -> Tensor | None:
        found = add(sums, *given)
        held.append(sum(total.nbytes for _, total in sums._sums.values()))
        return found

    monkeypatch.setattr(BlockSums, "add", watched)
    step(torch.bfloat16, False, ffn_block=256)
    feed_forward, out = 2 * 64 * 172, 2 * 64 * 4 * 16
    assert max(held) == _block_gradients(feed_forward, out, 2, False, True, "cuda")[1] - feed_forward


@pytest.mark.parametrize("family", ["llama", "gemma", "qwen2", "qwen3"])
@pytest.mark.parametrize(
    "memory", [{"keep_matmuls": 1}, {"activation_checkpointing": False}, {"keep_attention": False}], ids=str
)
def test_accumulators_get_every_gradient_once(family: str, memory: dict[str, bool]) -> None:
    """In fp32 the sum is autograd's, bit for bit where one block gives it; tied tables and biases are among them."""
    ours = step(torch.float32, True, family=family, **memory)
    theirs = step(torch.float32, False, family=family, **memory)
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[name], rtol=1e-6, atol=1e-7 * float(theirs[name].abs().max()))


@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_the_norm_of_a_sum_has_the_bits_of_both_operators(family: str) -> None:
    """Gradients of the sum, of its norm, and of both, each also without the other."""
    model = init_from(tiny(family))
    prepare_norms(model)
    norm = next(module for module in model.modules() if isinstance(module, TrainedNorm))
    x, y = (torch.randn(3, 7, 32, requires_grad=True) for _ in range(2))
    joined, total = norm.of_sum(x, y), x + y
    separate = (total, norm.forward(total))  # type: ignore[attr-defined]
    assert all(map(torch.equal, joined, separate))
    for first, second in ((1.0, 2.0), (1.0, 0.0), (0.0, 2.0)):
        sums = [first * (a * a).sum() + second * (b**3).sum() for a, b in (joined, separate)]
        ours, theirs = (torch.autograd.grad(value, [x, y], retain_graph=True) for value in sums)
        assert all(map(torch.equal, ours, theirs))
    (alone,) = torch.autograd.grad(norm.of_sum(x)[0].sum(), [x])
    assert torch.equal(alone, torch.ones_like(x))


@pytest.mark.parametrize("memory", [{"ffn_block": 16}, {"activation_checkpointing": False}], ids=str)
@pytest.mark.parametrize("family", ["llama", "gemma", "qwen2", "qwen3"])
def test_autocast_computes_products_in_bfloat16_and_gradients_in_fp32(family: str, memory: dict[str, int]) -> None:
    """As under accelerate's mixed_precision or Trainer's bf16, beside the same model in bfloat16 and in fp64."""
    exact = step(torch.float64, False, family=family, **memory)
    hf = init_from(tiny(family, hidden=64, ffn=172, window=TOKENS), dtype="bfloat16").float()
    model = LossModel(hf, MemoryConfig(**memory), z_loss=1e-3)  # type: ignore[arg-type]
    ids, positions, labels = sequence(TOKENS)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(ids, positions, labels).loss_sum / TOKENS
    loss.backward()
    found = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    assert {gradient.dtype for gradient in found.values()} == {torch.float32}
    narrow = step(torch.bfloat16, True, family=family, **memory)
    for group, error in errors({name: gradient.double() for name, gradient in found.items()}, exact).items():
        assert error < 1.1 * errors(narrow, exact)[group], group


@pytest.mark.parametrize("weight", [1, 3, 98303, 131072])
def test_the_scale_of_the_loss_is_not_rounded_to_the_weights_dtype(weight: int) -> None:
    """1 / 98,303 in bfloat16 is 0.2 % too large: the body's gradient would be so beside the head's, which is fp32."""
    from longctx.model.loss import token_losses

    torch.manual_seed(0)
    head = nn.Linear(64, 100, bias=False).bfloat16()
    head.weight.main_grad = torch.zeros(100, 64)  # type: ignore[attr-defined]
    labels, drawn = torch.randint(0, 100, (256,)), torch.randn(256, 64).bfloat16()

    def gradients(scale: float) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = drawn.clone().requires_grad_()
        head.weight.main_grad.zero_()  # type: ignore[attr-defined]
        (token_losses(hidden, head, labels, torch.ones(256), chunk=64).total * scale).backward()
        assert hidden.grad is not None
        return hidden.grad.double(), head.weight.main_grad.double().clone()  # type: ignore[attr-defined]

    for plain, scaled in zip(gradients(1.0), gradients(1.0 / weight), strict=True):
        assert float((scaled * plain).sum() / plain.square().sum()) * weight == pytest.approx(1.0, abs=5e-5)
