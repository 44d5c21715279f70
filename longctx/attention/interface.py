"""The attention function that transformers' AttentionInterface calls; this module does not import transformers.

transformers has no mask function for the name under which it is registered, so models build no mask, and extra keyword
arguments reach it: the layout travels as `layout=` through the model's forward (docs/attention.md). Attention that is
not exact and causal (sliding windows, soft-capping, sinks, dropout, dense masks) is refused with the layer's name and
never silently made full.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from longctx.attention.context import context_attention
from longctx.attention.local_layout import Layout

NAME = "longctx"


def register(register: Callable[[str, Callable], object], name: str = NAME) -> str:
    """Register `attend` with `AttentionInterface.register`; returns the name to pass as attn_implementation."""
    register(name, attend)
    return name


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

    Raises ValueError, which names the layer, for attention that longctx does not compute.
    """
    where = f"{type(module).__name__} of layer {getattr(module, 'layer_idx', '?')}"
    if layout is None:
        raise ValueError(f"{where} got no layout: pass layout=cp.layout(...) to the model's forward")
    window = options.get("sliding_window")
    if window is not None and window < layout.seq_len:
        raise ValueError(
            f"{where} has sliding_window={window}, shorter than the sequence of {layout.seq_len}: context attention "
            "is full within documents and would change the model"
        )
    if options.get("softcap") is not None:
        raise ValueError(f"{where} has softcap={options['softcap']}: soft-capped attention is not supported")
    if options.get("s_aux") is not None:
        raise ValueError(f"{where} has attention sinks (s_aux): they are not supported")
    if dropout and module.training:
        raise ValueError(f"{where} has attention dropout={dropout}: context attention has none; set it to 0")
    if attention_mask is not None:
        raise ValueError(f"{where} got a dense mask of shape {tuple(attention_mask.shape)}: documents are the layout's")
    if options.get("is_causal") is False or getattr(module, "is_causal", True) is False:
        raise ValueError(f"{where} is not causal: context attention is")
    out = context_attention(query, key, value, layout, scale=scaling)
    assert isinstance(out, Tensor)
    return out.transpose(1, 2), None
