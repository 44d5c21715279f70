"""A model's shape without loading it: from the config.json of a folder or hub id, or from model.init.

Only JSON is read, so that planning needs neither transformers nor the weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from longctx.config.model import InitConfig, ModelConfig
from longctx.errors import UserError
from longctx.rope import rope_of, rope_of_init
from longctx.storage.model import read_config


@dataclass(frozen=True)
class Shape:
    """A decoder of `layers` blocks: grouped-query attention and a gated feed-forward network."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    tied: bool
    rope: dict[str, Any]
    window: int

    @property
    def layer_weights(self) -> int:
        """Weights of one block's matrix products."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return attention + 3 * self.hidden * self.ffn

    @property
    def matmul_weights(self) -> int:
        """Weights that take part in matrix products: all blocks and the head."""
        return self.layers * self.layer_weights + self.vocab * self.hidden

    @property
    def parameters(self) -> int:
        """All weights, norms included (biases and per-head norms, where a family has them, are not)."""
        tables = self.vocab * self.hidden * (1 if self.tied else 2)
        return self.layers * (self.layer_weights + 2 * self.hidden) + tables + self.hidden


def shape_of(model: ModelConfig) -> Shape:
    """Raises UserError when config.json cannot be found or lacks what a decoder has."""
    return _from_init(model.init) if model.init is not None else _from_json(*read_config(model.path))


def _from_init(init: InitConfig) -> Shape:
    rope = rope_of_init(init)
    return Shape(
        init.layers,
        init.hidden,
        init.heads,
        init.kv_heads,
        rope.head_dim,
        init.ffn,
        init.vocab,
        init.tie_embeddings,
        dict(rope.parameters),
        rope.window,
    )


def _from_json(values: dict[str, Any], file: str) -> Shape:
    try:
        heads, hidden = values["num_attention_heads"], values["hidden_size"]
        rope = rope_of(values, file)
        return Shape(
            layers=values["num_hidden_layers"],
            hidden=hidden,
            heads=heads,
            kv_heads=values.get("num_key_value_heads") or heads,
            head_dim=rope.head_dim,
            ffn=values["intermediate_size"],
            vocab=values["vocab_size"],
            tied=bool(values.get("tie_word_embeddings", False)),
            rope=dict(rope.parameters),
            window=rope.window,
        )
    except KeyError as error:
        raise UserError(
            f"{file} has no {error}, so it does not describe a decoder; fetch the model's config.json again"
        ) from None
