"""liger-kernel's operators and products that add in fp32, on this card, in bfloat16."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor

from longctx.config.model import Fused, InitConfig, MemoryConfig
from longctx.model import LossModel, init_from
from longctx.model.operators import choose
from longctx.model.products import add_product
from tests.gpu.card import CARD, DTYPE, ON_CUDA
from tests.model.conftest import main_grads

TOKENS = 2048
# hidden, heads, kv heads, feed-forward, vocabulary of Llama-3-8B and Gemma-7B; a width takes Triton some ten seconds
WIDTHS = {"llama": (4096, 32, 8, 14336, 128256), "gemma": (3072, 16, 16, 24576, 256000)}
needs_liger = pytest.mark.skipif(
    not ON_CUDA or find_spec("liger_kernel") is None, reason="needs a CUDA device and liger-kernel"
)


def spec(family: str, layers: int = 1, **changes: Any) -> InitConfig:
    hidden, heads, kv, ffn, vocab = WIDTHS[family]
    shape = {"hidden": hidden, "heads": heads, "kv_heads": kv, "ffn": ffn, "vocab": vocab, "window": TOKENS}
    return InitConfig(family=family, layers=layers, **{**shape, **changes})  # type: ignore[arg-type]


@needs_liger
@pytest.mark.parametrize("family", WIDTHS)
def test_auto_takes_liger_at_the_widths_of_real_models(family: str) -> None:
    with CARD:
        model = LossModel(init_from(spec(family), dtype="bfloat16"), MemoryConfig())
    backbone: Any = model.model.model  # type: ignore[union-attr]
    assert choose("auto", backbone, CARD) == "liger"


def gradients(dtype: torch.dtype, fused: Fused, accumulated: bool, **memory: Any) -> dict[str, Tensor]:
    """The gradients in fp64 of a small model drawn in bfloat16, computed in `dtype` on the card."""
    small = spec("llama", 2, hidden=256, heads=4, kv_heads=2, ffn=688, vocab=512)
    hf = init_from(small, dtype="bfloat16").to(CARD, dtype)
    model = LossModel(hf, MemoryConfig(fused=fused, loss_chunk=512, **memory), z_loss=1e-3)
    made = main_grads(model) if accumulated else {}
    ids = torch.randint(512, (1, TOKENS), generator=torch.Generator().manual_seed(1)).to(CARD)
    labels = torch.cat([ids[:, 1:], ids.new_full((1, 1), -100)], dim=1)
    (model(ids, torch.arange(TOKENS, device=CARD), labels).loss_sum / TOKENS).backward()
    return {name: made.get(name, weight.grad).double() for name, weight in model.named_parameters()}  # type: ignore[arg-type, union-attr]


def error(found: dict[str, Tensor], exact: dict[str, Tensor], part: str) -> float:
    distances = [(found[name] - exact[name]).norm() / exact[name].norm() for name in exact if part in name]
    return float(sum(distances)) / len(distances)


@needs_liger
@pytest.mark.parametrize(
    "memory", [{"ffn_block": 512}, {"keep_matmuls": 1}, {"activation_checkpointing": False}], ids=str
)
def test_a_step_with_ligers_kernels_is_as_exact_as_torchs(memory: dict[str, Any]) -> None:
    exact = gradients(torch.float64, "off", False)
    ours, torchs = (gradients(torch.bfloat16, fused, True, **memory) for fused in ("liger", "off"))
    for part in ("mlp", "self_attn", "norm", "lm_head", "embed"):
        assert error(ours, exact, part) < 1.25 * error(torchs, exact, part), part


@pytest.mark.parametrize("accumulated", [False, True])
def test_blocks_cost_bfloat16_gradients_no_digits(accumulated: bool) -> None:
    exact = gradients(torch.float64, "off", False)
    whole, blocks = (gradients(torch.bfloat16, "off", accumulated, ffn_block=size) for size in (0, 32))
    assert error(blocks, exact, "mlp") < 1.05 * error(whole, exact, "mlp")


def test_a_product_adds_in_fp32() -> None:
    """A sum rounded to bfloat16 on the way would be off by 2e-3."""
    a, b = (torch.randn(512, 256, device=CARD, dtype=DTYPE) for _ in range(2))
    total = torch.full((512, 512), 3.0, device=CARD)
    add_product(total, a, b.t())
    torch.testing.assert_close(total.double(), 3.0 + a.double() @ b.double().t(), rtol=1e-5, atol=1e-3)
