"""How many bytes a token of training costs on one device, from a model's shape; docs/memory.md explains the terms.

b bytes per element, E hidden, Q = heads x head dim, K = kv heads x head dim, F feed-forward, H heads
kept      = (E + Q) b + 4 H              of every layer: its input, the attention output, the lse
products  = (Q + 2 K + E + 2 F) b        of a layer that keeps its matrix products: q k v, o, gate, up
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from longctx.config.model import MemoryConfig


@dataclass(frozen=True)
class Footprint:
    """Bytes per token. kept and products are per layer; working is the one layer whose backward runs."""

    layers: int
    kept: int
    products: int
    working: int

    def per_token(self, keep_matmuls: int = 0) -> int:
        """What one more token costs at the peak, with that many layers keeping their products."""
        return self.layers * self.kept + keep_matmuls * self.products + self.working

    def fitting(self, tokens: int, budget: float) -> int:
        """Layers that can keep their products when `budget` bytes may be saved from forward to backward."""
        left = budget / tokens - self.per_token()
        return max(0, min(self.layers, int(left // self.products)))


def footprint(config: Any, itemsize: int) -> Footprint:
    """config: a transformers configuration; itemsize: bytes of an activation."""
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    e, q, k, f = config.hidden_size, heads * head_dim, kv_heads * head_dim, config.intermediate_size
    wide = max(4, itemsize)
    return Footprint(
        layers=config.num_hidden_layers,
        kept=(e + q) * itemsize + heads * wide,
        products=(q + 2 * k + e + 2 * f) * itemsize,
        working=working_bytes(e, q, k, itemsize),
    )


def working_bytes(e: int, q: int, k: int, itemsize: int) -> int:
    return (5 * e + 4 * q + 4 * k) * itemsize
