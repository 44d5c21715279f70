"""The numbers of a decoder: sizes, weights, bytes per token and flop per token, from config.json or model.init.

The module reads only JSON, so it needs neither torch nor transformers. A key that config.json leaves out takes the
default of transformers' configuration class. A value from which transformers cannot build a model is refused.

Letters: E hidden, H heads, Q = H x head_dim, K = kv heads x head_dim, F feed-forward, b bytes per element.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from longctx.errors import UserError
from longctx.storage.model import read_config

if TYPE_CHECKING:
    from longctx.config.model import InitConfig, MemoryConfig, ModelConfig


class Defaults(NamedTuple):
    """Defaults of an architecture's configuration class in transformers 5.23, for keys that config.json leaves out.

    window: max_position_embeddings. head_dim, kv_heads: None if they follow from hidden_size and the heads. tied:
    whether embedding and head share a table. not_null: the keys for which transformers refuses a null.
    """

    window: int
    head_dim: int | None
    kv_heads: int | None
    tied: bool
    not_null: frozenset[str]


DEFAULTS: dict[str, Defaults] = {
    "llama": Defaults(2048, None, None, False, frozenset()),
    "mistral": Defaults(131072, None, 8, False, frozenset({"num_key_value_heads"})),
    "qwen2": Defaults(32768, None, 32, False, frozenset({"head_dim"})),
    "qwen3": Defaults(32768, 128, 32, False, frozenset({"head_dim"})),
    "gemma": Defaults(8192, 256, 16, True, frozenset({"head_dim", "num_key_value_heads"})),
}
_QKV_BIAS = {"qwen2"}  # q, k and v always have a bias
_ATTENTION_BIAS = {"llama", "qwen3", "gemma"}  # attention_bias=true adds a bias to q, k, v and o
_MLP_BIAS = {"llama"}  # mlp_bias=true adds a bias to the feed-forward
_HEAD_NORMS = {"qwen3"}  # q and k have a norm over each head


@dataclass(frozen=True)
class Footprint:
    """Bytes that one token needs on its device during training (docs/memory.md).

    inputs: E b for each layer's input. attention: Q b + 4 H for each layer that keeps its attention output and lse.
    products: (Q + 2 K + 2 F) b for each layer that saves its matrix products (q, k, v, gate, up).
    working: (2 E + 3 Q + 5 K) b for the layer whose attention runs backward: the gradient of the residual, the normed
    input, q, the gradients of q and of the attention output, and k and v with their gradients.
    ends: 3 E b at the loss: the last layer's output, the last hidden states after the norm, and their gradient.
    everything: (4 E + 2 Q + 2 K + 4 F) b + 4 H for each layer without activation checkpointing.
    """

    layers: int
    inputs: int
    attention: int
    products: int
    working: int
    ends: int
    everything: int

    @property
    def kept(self) -> int:
        """What a layer saves under selective recomputation: (E + Q) b + 4 H."""
        return self.inputs + self.attention

    def per_token(self, keep_matmuls: int = 0, *, keep_attention: bool = True) -> int:
        """Bytes that one more token adds to the peak when `keep_matmuls` layers save their products.

        Without saved products the peak lies in the last layer's backward. With them it lies earlier, at the loss,
        because the backward frees a layer's products before its attention runs. Under full recomputation one layer's
        attention output and lse exist during its backward.
        """
        if not keep_attention:
            return self.layers * self.inputs + self.attention + self.working
        most = self.working if keep_matmuls == 0 else keep_matmuls * self.products + self.ends
        return self.layers * self.kept + most

    def kept_layers(self, memory: MemoryConfig, tokens: int) -> int:
        """Layers that save their products in a forward pass of `tokens` tokens; training and `plan` both use this."""
        if not memory.activation_checkpointing:
            return self.layers
        if memory.keep_matmuls == "auto":
            return self.fitting(tokens, (memory.budget_gib or 0.0) * 2**30)
        return min(memory.keep_matmuls, self.layers)

    def fitting(self, tokens: int, budget: float) -> int:
        """Layers that can save their products if the forward may save `budget` bytes for the backward."""
        left = budget / tokens - self.layers * self.kept - self.ends
        return max(0, min(self.layers, int(left // self.products)))


@dataclass(frozen=True)
class Flops:
    """Floating point operations of a training step, for MFU, HFU and the planner.

    MFU (PaLM, Chowdhery et al. 2204.02311, appendix B) counts the forward and backward of every matrix product, 6 per
    weight and token, and attention. Attention is counted causally and per document, as it is computed: a query-key
    pair costs 4 H D in the forward (2 for the scores, 2 for the values) and twice that in the backward. PaLM's formula
    counts the full square and would flatter long sequences. The embedding's gather, norms and biases count nothing;
    the head's product counts. HFU adds recomputation: activation checkpointing repeats the products of a layer but
    the last of its feed-forward, whose output nobody reads, and those that the layer keeps, and the flash backward
    computes the scores again (2 H D per pair). The attention forward runs once, and twice under full recomputation.

    matmul_weights: weights in matrix products, including the head. pair: heads x head size, summed over layers.
    repeated_weights: the weights of the products that activation checkpointing computes twice. full: whether it also
    repeats attention.
    """

    matmul_weights: int
    pair: int
    repeated_weights: int = 0
    full: bool = False

    def model(self, tokens: float, pairs: float) -> float:
        """FLOP that the model needs, without recomputation (for MFU)."""
        return 6.0 * self.matmul_weights * tokens + 12.0 * self.pair * pairs

    def hardware(self, tokens: float, pairs: float) -> float:
        """FLOP that the device executes, including recomputation (for HFU)."""
        return self.products(tokens) + (18.0 if self.full else 14.0) * self.pair * pairs

    def products(self, tokens: float) -> float:
        """FLOP that the device executes outside attention, including recomputation."""
        return (6.0 * self.matmul_weights + 2.0 * self.repeated_weights) * tokens


@dataclass(frozen=True)
class Shape:
    """The sizes of a decoder whose blocks have grouped-query attention and a gated feed-forward network.

    tied: whether embedding and head share one table. vectors: norm weights and biases of one block, counted.
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    tied: bool
    vectors: int

    @property
    def query(self) -> int:
        """Q, the width of all query heads."""
        return self.heads * self.head_dim

    @property
    def kv(self) -> int:
        """K, the width of all key (or value) heads."""
        return self.kv_heads * self.head_dim

    @property
    def projections(self) -> dict[str, tuple[int, int]]:
        """The shapes (rows, columns) of the matrices of one block."""
        return {
            "q_proj": (self.query, self.hidden),
            "k_proj": (self.kv, self.hidden),
            "v_proj": (self.kv, self.hidden),
            "o_proj": (self.hidden, self.query),
            "gate_proj": (self.ffn, self.hidden),
            "up_proj": (self.ffn, self.hidden),
            "down_proj": (self.hidden, self.ffn),
        }

    @property
    def layer_weights(self) -> int:
        """Weights in the matrix products of one block."""
        return sum(rows * columns for rows, columns in self.projections.values())

    @property
    def matmul_weights(self) -> int:
        """Weights in the matrix products of all blocks and the head."""
        return self.layers * self.layer_weights + self.vocab * self.hidden

    @property
    def parameters(self) -> int:
        """The number of parameters, including norms and biases; a tied table counts once."""
        tables = self.vocab * self.hidden * (1 if self.tied else 2)
        return self.layers * (self.layer_weights + self.vectors) + tables + self.hidden

    def footprint(self, itemsize: int) -> Footprint:
        """Bytes per token for activations of `itemsize` bytes; the lse is saved in fp32, or fp64 for fp64."""
        e, q, k, f = self.hidden, self.query, self.kv, self.ffn
        return Footprint(
            layers=self.layers,
            inputs=e * itemsize,
            attention=q * itemsize + self.heads * max(4, itemsize),
            products=(q + 2 * k + 2 * f) * itemsize,
            working=(2 * e + 3 * q + 5 * k) * itemsize,
            ends=3 * e * itemsize,
            everything=(4 * e + 2 * q + 2 * k + 4 * f) * itemsize + self.heads * max(4, itemsize),
        )

    def flops(self) -> Flops:
        """Flop per token of a step without recomputation."""
        return Flops(self.matmul_weights, self.layers * self.query)

    def trained_flops(self, memory: MemoryConfig, itemsize: int, tokens: int) -> Flops:
        """Flop per token of a step as it is trained: forward passes of `tokens` tokens of `itemsize` bytes a number."""
        plain = self.flops()
        if not memory.activation_checkpointing:
            return plain
        kept = self.footprint(itemsize).kept_layers(memory, tokens) * (self.query + 2 * self.kv + 2 * self.ffn)
        repeated = self.layers * (self.layer_weights - self.ffn * self.hidden) - kept * self.hidden
        return replace(plain, repeated_weights=repeated, full=not memory.keep_attention)


def shape_of(config: Mapping[str, Any], source: str) -> Shape:
    """The shape that a config.json, or transformers' config.to_dict(), describes.

    source: the file, for messages. Raises UserError when a number is missing or is not a positive integer.
    """
    inner = text_section(config)
    hidden, heads = integer(inner, "hidden_size", source), integer(inner, "num_attention_heads", source)
    head_dim, kv_heads = head_dim_of(config, source), kv_heads_of(config, source)
    ffn = integer(inner, "intermediate_size", source)
    if heads % kv_heads:
        raise UserError(f"num_attention_heads={heads} is not a multiple of num_key_value_heads={kv_heads} ({source})")
    return Shape(
        layers=integer(inner, "num_hidden_layers", source),
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        ffn=ffn,
        vocab=integer(inner, "vocab_size", source),
        tied=tied_of(config),
        vectors=_vectors(inner, hidden, heads * head_dim, kv_heads * head_dim, ffn, head_dim),
    )


def shape_of_init(init: InitConfig) -> Shape:
    """The shape of a randomly initialised model."""
    values = {
        "model_type": init.family,
        "num_hidden_layers": init.layers,
        "hidden_size": init.hidden,
        "num_attention_heads": init.heads,
        "num_key_value_heads": init.kv_heads,
        "intermediate_size": init.ffn,
        "vocab_size": init.vocab,
        "head_dim": init.head_dim or init.hidden // init.heads,
        "tie_word_embeddings": init.tie_embeddings,
    }
    return shape_of(values, "model.init")


def shape_of_model(model: ModelConfig) -> Shape:
    """The shape of the model that `model` loads or initialises; reads at most its config.json."""
    return shape_of_init(model.init) if model.init is not None else shape_of(*config_json(str(model.path)))


def head_dim_of(config: Mapping[str, Any], source: str) -> int:
    """The size of an attention head: head_dim, the architecture's default, or hidden_size / num_attention_heads."""
    inner, known = text_section(config), DEFAULTS.get(model_type_of(config))
    said = _said(config, "head_dim", source)
    if said is not None:
        return said
    if known and known.head_dim and "head_dim" not in inner:
        return known.head_dim
    hidden, heads = integer(inner, "hidden_size", source), integer(inner, "num_attention_heads", source)
    if hidden % heads:
        raise UserError(
            f"hidden_size={hidden} is not a multiple of num_attention_heads={heads}, so the size of a head does "
            f"not follow from them; write head_dim ({source})"
        )
    return hidden // heads


def kv_heads_of(config: Mapping[str, Any], source: str) -> int:
    """Key and value heads: num_key_value_heads, the architecture's default, or the number of query heads."""
    inner, known = text_section(config), DEFAULTS.get(model_type_of(config))
    own = known.kv_heads if known and "num_key_value_heads" not in inner else None
    return _said(config, "num_key_value_heads", source) or own or integer(inner, "num_attention_heads", source)


def tied_of(config: Mapping[str, Any]) -> bool:
    """Whether embedding and head share one table; in a multimodal config the outer key wins over the text section's."""
    for section in (config, text_section(config)):
        if section.get("tie_word_embeddings") is not None:
            return bool(section["tie_word_embeddings"])
    known = DEFAULTS.get(model_type_of(config))
    return bool(known and known.tied)


def text_section(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The text section of a multimodal config, or the config itself."""
    inner = config.get("text_config")
    return inner if isinstance(inner, Mapping) else config


def model_type_of(config: Mapping[str, Any]) -> str:
    """The text model's model_type, or "" if the config names no type."""
    return str(text_section(config).get("model_type") or "").removesuffix("_text")


def config_json(path: str | Path) -> tuple[dict[str, Any], str]:
    """The content and the file name of a config.json. path: its folder, a hub id, or the file itself.

    Raises UserError when the file does not exist or is not a JSON object.
    """
    text = str(path)
    return read_config(str(Path(text).parent) if text.endswith(".json") else text)


def integer(config: Mapping[str, Any], key: str, source: str) -> int:
    """The positive integer under `key`; like transformers, it refuses "64", 64.0 and null."""
    if key not in config:
        raise UserError(f"{key} is missing; without it the decoder's size is not known; add it ({source})")
    value = config[key]
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserError(
            f"{key}={json.dumps(value, default=repr)} is not a positive integer; write it as a plain number ({source})"
        )
    return value


def _said(config: Mapping[str, Any], key: str, source: str) -> int | None:
    """The number under `key`, or None if it is absent or null; raises UserError if transformers refuses the null."""
    inner, family = text_section(config), model_type_of(config)
    if inner.get(key) is not None:
        return integer(inner, key, source)
    known = DEFAULTS.get(family)
    if key in inner and known and key in known.not_null:
        raise UserError(
            f"{key}=null, and transformers builds no {family} model without the number; write it, or leave the key "
            f"out ({source})"
        )
    return None


def _vectors(inner: Mapping[str, Any], hidden: int, query: int, kv: int, ffn: int, head_dim: int) -> int:
    """Norm weights and biases of one block, counted."""
    family = str(inner.get("model_type") or "")
    found = 2 * hidden
    if family in _HEAD_NORMS:
        found += 2 * head_dim
    if family in _QKV_BIAS:
        found += query + 2 * kv
    if family in _ATTENTION_BIAS and inner.get("attention_bias"):
        found += query + 2 * kv + hidden
    if family in _MLP_BIAS and inner.get("mlp_bias"):
        found += 2 * ffn + hidden
    return found
