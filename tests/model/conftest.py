"""Tiny models of every family, and the plain transformers loss they are held against."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from longctx.config.model import InitConfig
from longctx.train.replicated import _widen_into

VOCAB = 61


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tiny(family: str = "llama", **changes) -> InitConfig:
    shape = {
        "layers": 2,
        "hidden": 32,
        "heads": 4,
        "kv_heads": 2,
        "ffn": 48,
        "vocab": VOCAB,
        "window": 256,
        "head_dim": 16,
    }
    return InitConfig(**{"family": family, **shape, **changes})


def sequence(tokens: int, *, batch: int = 1, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """input ids [batch, tokens], positions [tokens], labels already shifted."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(VOCAB, (batch, tokens), generator=generator)
    labels = torch.cat([ids[:, 1:], ids.new_full((batch, 1), -100)], dim=1)
    return ids, torch.arange(tokens), labels


def dense_mask(boundaries: list[int], dtype: torch.dtype) -> Tensor:
    """[1, 1, S, S]: causal inside each document, for transformers' own attention."""
    length = boundaries[-1]
    document = torch.zeros(length, dtype=torch.long)
    for start in boundaries[1:-1]:
        document[start:] += 1
    allowed = torch.ones(length, length).tril().bool() & (document[:, None] == document[None, :])
    return torch.zeros(length, length, dtype=dtype).masked_fill(~allowed, torch.finfo(dtype).min)[None, None]


def plain_token_losses(model: nn.Module, ids: Tensor, positions: Tensor, labels: Tensor, mask=None) -> Tensor:
    """transformers' token losses [B, S], 0 where unlabelled, with the logits kept whole."""
    logits = model(
        input_ids=ids, position_ids=positions.expand(len(ids), -1), attention_mask=mask, use_cache=False
    ).logits
    losses = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="none")
    return losses.view(labels.shape)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


def worst(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """The largest relative L2 distance over parameters; both must hold the same ones."""
    assert ours.keys() == theirs.keys()
    return max(((ours[name] - theirs[name]).norm() / theirs[name].norm()).item() for name in theirs)


def main_grads(model: nn.Module) -> dict[str, Tensor]:
    """Give every weight an fp32 accumulator, as engine=ddp does."""
    made = {}
    for name, weight in model.named_parameters():
        made[name] = weight.main_grad = torch.zeros_like(weight, dtype=torch.float32)  # type: ignore[attr-defined]
        weight.register_post_accumulate_grad_hook(_widen_into(made[name]))
    return made
