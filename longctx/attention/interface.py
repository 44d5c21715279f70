"""The attention function that transformers' AttentionInterface calls; this module does not import transformers.

Models build no mask for the name under which it is registered, and extra keyword arguments reach it: the layout travels
as `layout=` through the model's forward (docs/attention.md). Attention that is not exact and causal (sliding windows,
chunks, soft-capping, sinks, dropout, dense masks) is refused with the layer's name and never silently made full, and so
are positions and padding that do not fit the layout.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from longctx.attention.context import context_attention
from longctx.attention.local_layout import Layout

NAME = "longctx"
# transformers' kinds of layer that see all that is before them; "attention" was its older name for them.
_FULL = ("full_attention", "attention")
# Those that see a part of the sequence only, and the key of the config that says how much.
_REACH = {"sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}


def register(
    register: Callable[[str, Callable], object],
    name: str = NAME,
    masks: Callable[[str, Callable], object] | None = None,
) -> str:
    """Register `attend` with `AttentionInterface.register`; returns the name to pass as attn_implementation.

    masks: `AttentionMaskInterface.register`. Without it transformers drops an `attention_mask` of this name's models
    before anyone sees it; with it one that hides tokens before others is refused.
    """
    register(name, attend)
    if masks is not None:
        masks(name, no_mask)
    return name


def no_mask(*args: Any, attention_mask: Tensor | None = None, **options: Any) -> None:
    """Build no mask. Raises ValueError for padding before a token: attention would see it.

    attention_mask: transformers' [B, n], 0 for padding. Padding after the tokens changes nothing that they see.
    """
    if attention_mask is None or attention_mask.dim() != 2:
        return
    shown = attention_mask.bool()
    if bool((shown[:, 1:] & ~shown[:, :-1]).any()):
        raise ValueError(
            "attention_mask hides tokens before others (padding on the left), and context attention would see them: "
            "pad on the right, or pack sequences without padding, with cp.layout(seq_len=..., documents=cu_seqlens)"
        )


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    layout: Layout | None = None,
    **options,
) -> tuple[Tensor, None]:
    """Attend in a transformers layer: query [B, Hq, n, D], key and value [B, Hkv, n, D] -> ([B, n, Hq, D], None).

    Under torch.autocast it computes in autocast's dtype, as transformers' own does. Raises ValueError, which names the
    layer, for attention that longctx does not compute, and for positions that are not the layout's.
    """
    where = f"{type(module).__name__} of layer {getattr(module, 'layer_idx', '?')}"
    if layout is None:
        raise ValueError(f"{where} got no layout: pass layout=cp.layout(...) to the model's forward")
    _check_reach(module, where, layout.seq_len, options.get("sliding_window"))
    if options.get("softcap") is not None:
        raise ValueError(f"{where} has softcap={options['softcap']}: soft-capped attention is not supported")
    if options.get("s_aux") is not None:
        raise ValueError(f"{where} has attention sinks (s_aux): they are not supported")
    if dropout and module.training:
        raise ValueError(
            f"{where} has attention dropout={dropout}: context attention has none; load the model with "
            "attention_dropout=0.0, or set self_attn.attention_dropout = 0.0 in every layer"
        )
    if attention_mask is not None:
        raise ValueError(f"{where} got a dense mask of shape {tuple(attention_mask.shape)}: documents are the layout's")
    if options.get("is_causal") is False or getattr(module, "is_causal", True) is False:
        raise ValueError(f"{where} is not causal: context attention is")
    _check_positions(options.get("position_ids"), layout, where)
    q, k, v = _autocast(query, key, value)
    out = context_attention(q, k, v, layout, scale=scaling)
    assert isinstance(out, Tensor)
    return out.transpose(1, 2), None


def _check_reach(module: nn.Module, where: str, seq_len: int, window: int | None) -> None:
    """Refuse a layer that sees less than the sequence, by its argument or by its kind in the model's config."""
    config, index = getattr(module, "config", None), getattr(module, "layer_idx", None)
    kinds = getattr(config, "layer_types", None)
    kind = kinds[index] if kinds and isinstance(index, int) and index < len(kinds) else "full_attention"
    key = _REACH.get(kind, "sliding_window")
    if window is None and kind not in _FULL:
        window = getattr(config, key, None)
        if kind not in _REACH:
            raise ValueError(
                f"{where} is {kind} in the config's layer_types: context attention is full within documents and would "
                "change the model"
            )
    if window is not None and window < seq_len:
        raise ValueError(
            f"{where} has {key}={window}, shorter than the sequence of {seq_len}: context attention "
            "is full within documents and would change the model"
        )


def _check_positions(position_ids: Any, layout: Layout, where: str) -> None:
    """Refuse positions that a model makes itself for a whole sequence, and those of documents the layout has not.

    A layout is compared once: on a GPU the host waits for the result.
    """
    if layout.compared or torch.compiler.is_compiling() or not isinstance(position_ids, Tensor):
        return
    if position_ids.dim() > 2 or position_ids.shape[-1] != layout.local_len:  # 3-D: those of pictures
        return
    real = layout.valid.numpy()
    given = position_ids.reshape(-1, layout.local_len).numpy(force=True)[:, real]
    plain = np.flatnonzero(real)
    own = (layout.arithmetic.positions(layout.cp.rank, restart=restart)[real] for restart in (False, True))
    if (given == plain).all() and not any(np.array_equal(plain, each) for each in own):
        raise ValueError(
            f"{where} got the positions 0 to {layout.local_len - 1}, which the model made itself, and this rank holds "
            "other tokens of the sequence: pass position_ids=layout.positions[None] to the model's forward"
        )
    falls = given[:, 1:] < given[:, :-1]
    falls[:, layout.local_boundaries.numpy()[1:-1] - 1] = False  # where another document begins
    if falls.any():
        raise ValueError(
            f"{where} got position_ids that begin again inside a document of the layout, and attention would not stop "
            "there: pass cp.layout(seq_len=..., documents=cu_seqlens)"
        )
    layout.compared = True


def _autocast(*tensors: Tensor) -> list[Tensor]:
    """q, k and v in the dtype of torch.autocast where it is on: the rotation leaves q and k wider than v."""
    kind = tensors[0].device.type
    if not (torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)):
        return list(tensors)
    return [x if x.dtype == torch.float64 else x.to(torch.get_autocast_dtype(kind)) for x in tensors]
