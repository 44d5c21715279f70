"""How many bytes a token of training costs on one device, from a model's shape; docs/memory.md explains them.

b bytes per element, E hidden, Q = heads x head dim, K = kv heads x head dim, F feed-forward, H heads:

    kept      = (E + Q) b + 4 H         every layer: its input, the attention output, the lse
    products  = (Q + 2 K + E + 2 F) b   a layer that keeps its matrix products: q k v, o, gate, up
    working   = (2 E + 3 Q + 5 K) b     the layer whose attention runs backward: the residual's gradient and
                                        the normed input; q, gradients of attention output and q; k, v, theirs
    ends      = 2 E b                   at the loss: the last hidden states and their gradient
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from longctx.config.model import MemoryConfig
    from longctx.plan.shape import Shape


@dataclass(frozen=True)
class Footprint:
    """Bytes per token; kept and products are per layer."""

    layers: int
    kept: int
    products: int
    working: int
    ends: int

    def per_token(self, keep_matmuls: int = 0) -> int:
        """What one more token costs at the peak, with that many layers keeping their products.

        Without products the peak is the last layer's backward; with them it comes earlier, at the loss, since
        the backward frees a layer's products before its attention runs.
        """
        most = self.working if keep_matmuls == 0 else keep_matmuls * self.products + self.ends
        return self.layers * self.kept + most

    def fitting(self, tokens: int, budget: float) -> int:
        """Layers that can keep their products when `budget` bytes may be saved from forward to backward."""
        left = budget / tokens - self.layers * self.kept - self.ends
        return max(0, min(self.layers, int(left // self.products)))


def footprint(config: Any, itemsize: int) -> Footprint:
    """config: a transformers configuration; itemsize: bytes of an activation."""
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return _footprint(
        config.num_hidden_layers, config.hidden_size, heads, kv_heads, head_dim, config.intermediate_size, itemsize
    )


def footprint_of(shape: Shape, itemsize: int) -> Footprint:
    """The same for a model of which only the shape is known."""
    return _footprint(shape.layers, shape.hidden, shape.heads, shape.kv_heads, shape.head_dim, shape.ffn, itemsize)


def _footprint(layers: int, e: int, heads: int, kv_heads: int, head_dim: int, f: int, itemsize: int) -> Footprint:
    q, k = heads * head_dim, kv_heads * head_dim
    return Footprint(
        layers=layers,
        kept=(e + q) * itemsize + heads * max(4, itemsize),
        products=(q + 2 * k + e + 2 * f) * itemsize,
        working=(2 * e + 3 * q + 5 * k) * itemsize,
        ends=2 * e * itemsize,
    )


def kept_layers(memory: MemoryConfig, cost: Footprint, tokens: int) -> int:
    """Layers that keep what their matrix products gave."""
    if not memory.checkpoint:
        return cost.layers
    if memory.keep_matmuls == "auto":
        return cost.fitting(tokens, (memory.budget_gib or 0.0) * 2**30)
    return min(memory.keep_matmuls, cost.layers)
