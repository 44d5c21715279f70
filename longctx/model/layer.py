"""The decoder layer as it is trained: attention computed once, everything else recomputed in token blocks.

A layer is two checkpointed regions around the attention op: tokens -> q, k, v -> attention, whose output and
lse are saved, and a block of tokens -> o_proj, residual, feed-forward. Only the layer's input, the attention
output and lse outlive the forward pass; no product but q, k, v, o, gate and up is ever repeated, and the
feed-forward's wide activations exist for one block at a time (Liu et al. 2310.01889, blockwise FFN).

Shapes: B batch, S tokens of this rank, E hidden size, H heads, D head dim.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from longctx.attention.interface import attend
from longctx.config.model import MemoryConfig
from longctx.model.architectures import backbone_of, check_layers
from longctx.model.norms import train_norms
from longctx.model.offload import HostStore
from longctx.model.rotary import Rotate
from longctx.model.saved import SAVE_EVERYTHING, SavePolicy, selective_checkpoint
from longctx.shape import shape_of


class TrainedLayer:
    """Mixed into a family's decoder layer class by `train_layers`; runs when a layout is passed.

    Without a layout (plain generation, a look at hidden states) the family's own forward runs.
    """

    save_policy: SavePolicy = SAVE_EVERYTHING

    def forward(
        self,
        hidden_states: Tensor,
        *args: Any,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        layout: Any = None,
        **kwargs: Any,
    ) -> Tensor:
        if layout is None or position_embeddings is None:
            own: Any = super()
            return own.forward(hidden_states, *args, position_embeddings=position_embeddings, **kwargs)
        policy = self.save_policy
        with policy.saving():
            out = selective_checkpoint(
                policy.attention, policy.store, _attend, self, hidden_states, position_embeddings, layout
            )
            block = policy.block // hidden_states.shape[0] or hidden_states.shape[1]
            parts = zip(hidden_states.split(block, 1), out.split(block, 1), strict=True)
            finished = [selective_checkpoint(policy.feed_forward, policy.store, _finish, self, *part) for part in parts]
            return finished[0] if len(finished) == 1 else torch.cat(finished, dim=1)


def _attend(layer: Any, x: Tensor, turn: tuple[Tensor, Tensor], layout: Any) -> Tensor:
    """x [B, S, E], turn = cos, sin [B, S, D] -> attention output [B, S, H*D], before o_proj."""
    module = layer.self_attn
    normed = layer.input_layernorm(x)
    q, k, v = (
        projection(normed).unflatten(-1, (-1, module.head_dim))
        for projection in (module.q_proj, module.k_proj, module.v_proj)
    )
    if hasattr(module, "q_norm"):
        q, k = module.q_norm(q), module.k_norm(k)
    q, k = Rotate.apply(q, *turn), Rotate.apply(k, *turn)
    dropout = module.attention_dropout if module.training else 0.0
    window = getattr(module, "sliding_window", None)
    out, _ = attend(
        module, q, k, v.transpose(1, 2), scaling=module.scaling, dropout=dropout, layout=layout,
        sliding_window=window,
    )  # fmt: skip
    return out.flatten(2)


def _finish(layer: Any, x: Tensor, out: Tensor) -> Tensor:
    """A block of the layer's input and of its attention output -> the layer's output, all [B, block, E]."""
    hidden = x + layer.self_attn.o_proj(out)
    return hidden + layer.mlp(layer.post_attention_layernorm(hidden))


def train_layers(model: nn.Module) -> None:
    """Make every decoder layer of `model` a TrainedLayer and every norm a TrainedNorm, in place.

    Their classes change, modules and names of parameters do not.
    """
    check_layers(model)
    for layer in backbone_of(model).layers:
        if not isinstance(layer, TrainedLayer):
            layer.__class__ = _trained(type(layer))
    train_norms(model)


def set_save_policies(model: nn.Module, memory: MemoryConfig, *, tokens: int, store: HostStore | None) -> None:
    """Tell every layer what to keep for a forward of `tokens` tokens (batch included)."""
    base = backbone_of(model)
    shape = shape_of(base.config.to_dict(), "the model's config")
    keep = shape.footprint(base.embed_tokens.weight.element_size()).kept_layers(memory, tokens)
    count = len(base.layers)
    for index, layer in enumerate(base.layers):
        layer.save_policy = SavePolicy.of(memory, layer=index, layers=count, keep_matmuls=keep, store=store)


@cache
def _trained(family: type) -> type:
    """One subclass per family class, so that ZeRO-3 can be told of it as a leaf module."""
    return type(f"Trained{family.__name__}", (TrainedLayer, family), {})
