"""Attention of the last layer at a few positions only.

The logits at some positions depend on all keys and values of the last layer, but on its queries at those positions
alone. So its attention is computed there and is zero elsewhere: of a model of L layers, 1/L of the attention of a
prompt is left out, half of it for the quickstart's two layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from threading import local
from typing import Any

import torch
from torch import Tensor

_asked = local()  # positions of the prompt that this thread computes; prompts run in several threads


@contextmanager
def only_at(where: Tensor) -> Iterator[None]:
    """Within it, models loaded with `attention_name()` compute their last layer at the positions `where` [A] only.

    Their outputs elsewhere are wrong. It holds for the calling thread and for prompts without padding or cache.
    """
    before = getattr(_asked, "where", None)
    _asked.where = where
    try:
        yield
    finally:
        _asked.where = before


@cache
def attention_name() -> str:
    """Register this attention with transformers and return its name, for `attn_implementation`."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    name = "sdpa_at_answers"
    AttentionInterface.register(name, _attend)
    AttentionMaskInterface.register(name, sdpa_mask)
    return name


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """transformers' sdpa attention, and in the last layer the same at the positions that `only_at` names.

    query [B, Hq, S, D], key and value [B, Hkv, S, D], attention_mask [B, 1, S, S] or None for causal. Returns
    [B, S, Hq, D].
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    where: Tensor | None = getattr(_asked, "where", None)
    if where is None or module.layer_idx != module.config.num_hidden_layers - 1:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    where = where.to(query.device)
    if attention_mask is None:
        mask = torch.arange(key.shape[2], device=query.device) <= where[:, None]
    else:
        mask = attention_mask[:, :, where]
    # The query heads of a KV head become rows of it, so that keys and values are not repeated.
    groups = query.shape[1] // key.shape[1]
    rows = query[:, :, where].unflatten(1, (key.shape[1], groups)).flatten(2, 3)
    some = torch.nn.functional.scaled_dot_product_attention(
        rows, key, value, attn_mask=torch.cat([mask] * groups, -2), scale=kwargs.get("scaling")
    )
    out = query.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[3])
    out[:, where] = some.unflatten(2, (groups, len(where))).flatten(1, 2).transpose(1, 2)
    return out, None
