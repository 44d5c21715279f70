"""The decoder layer in training: attention runs once, everything else is recomputed in blocks of tokens.

A layer has two checkpointed regions. The first goes from the tokens over q, k and v through attention, whose output and
lse are saved. The second takes a block of tokens through o_proj, the residual and the feed-forward. Only the layer's
input, the attention output and the lse outlive the forward pass. The backward repeats no products other than q, k, v,
o, gate and up, and the wide activations of the feed-forward exist for one block at a time (Liu et al. 2310.01889,
blockwise FFN).

Under full recomputation (keep_attention=false) only the layer's input outlives the forward pass. A checkpoint around
both regions repeats the first one, and with it attention and its communication, before the layer's backward.

Shapes: B batch, S tokens of this rank, E hidden size, H heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from longctx.attention.interface import attend
from longctx.config.model import MemoryConfig
from longctx.model.architectures import backbone_of, check_layers
from longctx.model.feed_forward import feed_forward
from longctx.model.fused import Operators
from longctx.model.mixin import Mixin
from longctx.model.norms import TrainedNorm, prepare_norms, sum_and_norm
from longctx.model.offload import HostStore
from longctx.model.products import BlockSums, project
from longctx.model.rotary import keep_frequencies, rotate
from longctx.model.saved import CheckpointedCall, SavePolicy, selective_checkpoint
from longctx.shape import shape_of


class TrainedLayer(Mixin):
    """The forward that `prepare_layers` mixes into an architecture's decoder layer; it runs when a layout is passed.

    Without a layout, as in plain generation, transformers' own forward runs.
    """

    save_policy: SavePolicy = SavePolicy()
    operators: Operators = "torch"

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
        with self.save_policy.saving():
            if self.save_policy.full:
                arguments = (self, hidden_states, position_embeddings, layout)
                return selective_checkpoint(_regions, *arguments, draws=_draws(self))
            return _regions(self, hidden_states, position_embeddings, layout, CheckpointedCall())


def _regions(layer: Any, x: Tensor, turn: tuple[Tensor, Tensor], layout: Any, call: CheckpointedCall) -> Tensor:
    """Both regions: x [B, S, E] -> the layer's output [B, S, E].

    A repetition needs only what the second region's checkpoints save, which are its arguments, so it computes nothing
    after the first.
    """
    policy = layer.save_policy
    x, out = _region(policy.recompute and not policy.full, _attend, layer, x, turn, layout)
    finish = _skip if call.repeats else _finish
    block = max(1, policy.block // x.shape[0]) if policy.block else x.shape[1]
    parts = list(zip(x.split(block, 1), out.split(block, 1), strict=True))
    sums = BlockSums(len(parts))
    finished = [_region(policy.recompute, finish, layer, *part, sums) for part in parts]
    return finished[0] if len(finished) == 1 else torch.cat(finished, dim=1)


def _region(recompute: bool, function: Callable[..., Any], layer: Any, *args: Any) -> Any:
    """Call function(layer, *args, call), as a checkpoint if it is to be recomputed."""
    if not recompute:
        return function(layer, *args, CheckpointedCall())
    return selective_checkpoint(function, layer, *args, store=layer.save_policy.store, draws=_draws(layer))


def _draws(layer: Any) -> bool:
    """Whether the layer may draw random numbers: adapters around its products have dropout, its own parts have none."""
    own, mlp = layer.self_attn, layer.mlp
    products = (own.q_proj, own.k_proj, own.v_proj, own.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj)
    return any(type(product) is not nn.Linear for product in products)


def _attend(
    layer: Any, x: Tensor, turn: tuple[Tensor, Tensor], layout: Any, call: CheckpointedCall
) -> tuple[Tensor, Tensor]:
    """The first region: x [B, S, E], turn = (cos, sin) [B, S, D] -> x, attention output [B, S, H * D] before o_proj.

    x goes through, so that the norm adds the residual's gradient to its own.
    """
    module = layer.self_attn
    x, normed = sum_and_norm(layer.input_layernorm, x)
    with call.keeping(layer.save_policy.products):
        products = project(normed, module.q_proj, module.k_proj, module.v_proj)
    q, k, v = (product.unflatten(-1, (-1, module.head_dim)) for product in products)
    if hasattr(module, "q_norm"):
        q, k = module.q_norm(q), module.k_norm(k)
    if layer.operators == "liger" and layer.save_policy.products and not hasattr(module, "q_norm"):
        q, k = q.clone(), k.clone()  # the kept products, which the rotation would overwrite
    q, k = rotate(layer.operators, q, k, *turn)
    dropout = module.attention_dropout if module.training else 0.0
    window = getattr(module, "sliding_window", None)
    with call.keeping():
        out, _ = attend(
            module, q, k, v.transpose(1, 2), scaling=module.scaling, dropout=dropout, layout=layout,
            sliding_window=window,
        )  # fmt: skip
    return x, out.flatten(2)


def _finish(layer: Any, x: Tensor, out: Tensor, sums: BlockSums, call: CheckpointedCall) -> Tensor:
    """The second region: a block of the layer's input and attention output -> the layer's output [B, block, E].

    A repetition leaves out the last product, which nobody reads.
    """
    (projected,) = project(out, layer.self_attn.o_proj, sums=sums)
    hidden, normed = sum_and_norm(layer.post_attention_layernorm, x, projected)
    kept = call.keeping(layer.save_policy.products)
    made = feed_forward(layer.operators, layer.mlp, normed, sums, kept=kept, compute=not call.repeats)
    return made if call.repeats else hidden + made


def _skip(layer: Any, x: Tensor, out: Tensor, sums: BlockSums, call: CheckpointedCall) -> Tensor:
    """The second region in a repetition."""
    return x


def prepare_layers(model: nn.Module) -> None:
    """Make every decoder layer of `model` a TrainedLayer and every norm a TrainedNorm, in place.

    Only their classes change; the modules and the names of their parameters do not. The rotary module keeps its
    frequencies from now on when the model's dtype changes.
    """
    check_layers(model)
    for layer in backbone_of(model).layers:
        TrainedLayer.into(layer)
    prepare_norms(model)
    keep_frequencies(backbone_of(model))


def set_operators(model: nn.Module, operators: Operators) -> None:
    """Say whose operators do the element-wise work of every TrainedLayer and TrainedNorm."""
    for module in model.modules():
        if isinstance(module, TrainedLayer | TrainedNorm):
            module.operators = operators


def set_save_policies(
    model: nn.Module, memory: MemoryConfig, *, block: int, tokens: int, store: HostStore | None
) -> None:
    """Set each layer's save policy for a forward pass of `tokens` tokens (batch included), `block` of them at once."""
    base = backbone_of(model)
    shape = shape_of(base.config.to_dict(), "the model's config")
    keep = shape.footprint(base.embed_tokens.weight.element_size()).kept_layers(memory, tokens)
    count = len(base.layers)
    for index, layer in enumerate(base.layers):
        layer.save_policy = SavePolicy.of(
            memory, block=block, layer=index, layers=count, keep_matmuls=keep, store=store
        )
