"""q, k, v of real text: hidden states of the trained tiny model, projected to any number of heads and dimensions.

The model's text is long enough for packed documents of 1 to 4,097 tokens.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from longctx.config.model import ModelConfig
from longctx.model import model_of
from tests.gpu.card import CARD
from tests.train.made import TOKENIZER

DOCUMENTS = (1, 2, 7, 63, 64, 65, 4097)  # tokens of each
TOKENS = sum(DOCUMENTS)


@lru_cache(maxsize=1)
def hidden() -> Tensor:
    """[S, E] in fp64 on the device, one row per token of a Python source, each row with unit variance."""
    import argparse

    from transformers import AutoTokenizer

    text = Path(argparse.__file__).read_text()
    ids = AutoTokenizer.from_pretrained(TOKENIZER)(text, return_tensors="pt").input_ids[:, : 2 * TOKENS]
    model = model_of(ModelConfig(path=TOKENIZER, attention="sdpa", dtype="float32")).to(CARD)
    with torch.no_grad():
        found = model.model(input_ids=ids[:, : 2 * TOKENS].to(CARD), use_cache=False).last_hidden_state[0]
    found = found.double()
    assert len(found) >= TOKENS, f"the text has {len(found)} tokens, {TOKENS} are needed"
    return (found - found.mean(0)) / found.std()


def qkv(batch: int, tokens: int, q_heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> list[Tensor]:
    """q, k, v and a gradient of out, [batch, heads, tokens, head_dim], tokens before heads in memory."""
    make = torch.Generator(device=CARD).manual_seed(head_dim + q_heads)
    rows = hidden()[:tokens]
    found = []
    for heads in (q_heads, kv_heads, kv_heads, q_heads):
        drawn = torch.randn(batch, rows.shape[1], heads * head_dim, generator=make, device=CARD, dtype=torch.float64)
        projected = rows @ drawn / rows.shape[1] ** 0.5
        found.append(projected.unflatten(-1, (heads, head_dim)).transpose(1, 2).to(dtype))
    return found


def relative(got: Tensor, want: Tensor) -> float:
    """RMS of the error divided by the RMS of what is wanted."""
    return float((got.double() - want).square().mean().sqrt() / want.square().mean().sqrt())
