"""A decoder's numbers: sizes, weights, bytes per token and flop per token, from its config.json or from model.init.

Only JSON is read, so neither torch nor transformers is needed. A key that config.json leaves out has the value that
transformers' configuration class gives it, and a value that transformers cannot build a model from is refused.

Letters: E hidden, H heads, Q = H x head_dim, K = kv heads x head_dim, F feed-forward, b bytes per element.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from longctx.errors import UserError
from longctx.storage.model import read_config

if TYPE_CHECKING:
    from longctx.config.model import InitConfig, MemoryConfig, ModelConfig


class Defaults(NamedTuple):
    """What a family's configuration class in transformers 5.23 takes for keys that config.json leaves out.

    window: max_position_embeddings. head_dim, kv_heads: None where they follow from hidden_size and the heads.
    not_null: those of head_dim and num_key_value_heads with which no model is built when they are null.
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
# Biases beside those that attention_bias and mlp_bias ask for, and norms per head.
_QKV_BIAS = {"qwen2"}
_ATTENTION_BIAS = {"llama", "qwen3", "gemma"}
_MLP_BIAS = {"llama"}
_HEAD_NORMS = {"qwen3"}


@dataclass(frozen=True)
class Footprint:
    """Bytes that a token of training costs on one device (docs/memory.md); kept and products are per layer.

    kept: (E + Q) b + 4 H, every layer's input, attention output and lse. products: (Q + 2 K + E + 2 F) b, a layer
    that keeps its matrix products (q k v, o, gate, up). working: (2 E + 3 Q + 5 K) b, the layer whose attention runs
    backward (the residual's gradient and the normed input; q, gradients of attention output and q; k, v, theirs).
    ends: 2 E b at the loss, the last hidden states and their gradient.
    """

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

    def kept_layers(self, memory: MemoryConfig, tokens: int) -> int:
        """Layers that keep their products in a forward pass of `tokens` tokens, as training decides and plan counts."""
        if not memory.checkpoint:
            return self.layers
        if memory.keep_matmuls == "auto":
            return self.fitting(tokens, (memory.budget_gib or 0.0) * 2**30)
        return min(memory.keep_matmuls, self.layers)

    def fitting(self, tokens: int, budget: float) -> int:
        """Layers that can keep their products when `budget` bytes may be saved from forward to backward."""
        left = budget / tokens - self.layers * self.kept - self.ends
        return max(0, min(self.layers, int(left // self.products)))


@dataclass(frozen=True)
class Flops:
    """Floating point operations of a training step, for MFU, HFU and the planner.

    MFU (PaLM, Chowdhery et al. 2204.02311, appendix B): forward and backward of every matrix product, 6 per
    weight and token, plus attention. Attention is counted causally and per document, as it is computed: a
    query-key pair costs 4 H D in the forward (scores and values, 2 each) and twice that in the backward; PaLM's
    formula counts the full square and would flatter long sequences. The embedding's gather is free, the head's
    product is not, and norms and biases take part in no product. HFU adds what is recomputed on purpose: with
    activation checkpointing every layer's products run forward once more, and the flash backward forms the scores
    again (2 H D per pair); the attention forward itself is kept.

    matmul_weights: weights used in matrix products, the head included; layer_weights: without it. pair: heads x
    head size, summed over layers.
    """

    matmul_weights: int
    layer_weights: int
    pair: int
    recompute: bool

    def model(self, tokens: float, pairs: float) -> float:
        """FLOP that the mathematics asks for."""
        return 6.0 * self.matmul_weights * tokens + 12.0 * self.pair * pairs

    def hardware(self, tokens: float, pairs: float) -> float:
        """FLOP that are executed."""
        return self.products(tokens) + 14.0 * self.pair * pairs

    def products(self, tokens: float) -> float:
        """FLOP that are executed outside attention."""
        again = 2.0 * self.layer_weights * tokens if self.recompute else 0.0
        return 6.0 * self.matmul_weights * tokens + again


@dataclass(frozen=True)
class Shape:
    """A decoder of `layers` blocks: grouped-query attention and a gated feed-forward network.

    tied: whether embedding and head are one table. vectors: norm weights and biases of one block.
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
        """(rows, columns) of the matrices of one block."""
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
        """Weights of one block's matrix products."""
        return sum(rows * columns for rows, columns in self.projections.values())

    @property
    def matmul_weights(self) -> int:
        """Weights that take part in matrix products: all blocks and the head."""
        return self.layers * self.layer_weights + self.vocab * self.hidden

    @property
    def parameters(self) -> int:
        """All weights, norms and biases included; a tied table counts once."""
        tables = self.vocab * self.hidden * (1 if self.tied else 2)
        return self.layers * (self.layer_weights + self.vectors) + tables + self.hidden

    def footprint(self, itemsize: int) -> Footprint:
        """Bytes per token when an activation takes `itemsize` bytes; the lse is kept in fp32, of fp64 in fp64."""
        e, q, k, f = self.hidden, self.query, self.kv, self.ffn
        return Footprint(
            layers=self.layers,
            kept=(e + q) * itemsize + self.heads * max(4, itemsize),
            products=(q + 2 * k + e + 2 * f) * itemsize,
            working=(2 * e + 3 * q + 5 * k) * itemsize,
            ends=2 * e * itemsize,
        )

    def flops(self, *, recompute: bool) -> Flops:
        """recompute: activation checkpointing runs every block's products forward once more."""
        pair = self.layers * self.query
        return Flops(self.matmul_weights, self.layers * self.layer_weights, pair, recompute)


def shape_of(config: Mapping[str, Any], source: str) -> Shape:
    """The shape in a config.json's content, or in transformers' config.to_dict().

    source: the file, for messages. Raises UserError where a number is missing or is not a positive integer.
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
    """The shape of a model that is drawn at random."""
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
    """The shape of the model that `model` loads or draws; reads at most its config.json."""
    return shape_of_init(model.init) if model.init is not None else shape_of(*config_json(str(model.path)))


def head_dim_of(config: Mapping[str, Any], source: str) -> int:
    """The size of an attention head: head_dim, the family's own, or hidden_size / num_attention_heads."""
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
    """Key and value heads: num_key_value_heads, the family's own number, or as many as query heads."""
    inner, known = text_section(config), DEFAULTS.get(model_type_of(config))
    own = known.kv_heads if known and "num_key_value_heads" not in inner else None
    return _said(config, "num_key_value_heads", source) or own or integer(inner, "num_attention_heads", source)


def tied_of(config: Mapping[str, Any]) -> bool:
    """Whether embedding and head are one table; a multimodal config's own key decides before its text section's."""
    for section in (config, text_section(config)):
        if section.get("tie_word_embeddings") is not None:
            return bool(section["tie_word_embeddings"])
    known = DEFAULTS.get(model_type_of(config))
    return bool(known and known.tied)


def text_section(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The language model's part of a multimodal config, or the config itself."""
    inner = config.get("text_config")
    return inner if isinstance(inner, Mapping) else config


def model_type_of(config: Mapping[str, Any]) -> str:
    """The text model's model_type, "" where the config names none."""
    return str(text_section(config).get("model_type") or "").removesuffix("_text")


def config_json(path: str | Path) -> tuple[dict[str, Any], str]:
    """Return (content, file) of the config.json in a folder, at a hub id, or at the file itself.

    Raises UserError when there is none, or when it is not a JSON object.
    """
    text = str(path)
    return read_config(str(Path(text).parent) if text.endswith(".json") else text)


def integer(config: Mapping[str, Any], key: str, source: str) -> int:
    """A positive integer of config.json; transformers takes neither "64" nor 64.0 nor null for one."""
    if key not in config:
        raise UserError(f"{key} is missing; without it the decoder's size is not known; add it ({source})")
    value = config[key]
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserError(f"{key}={json.dumps(value)} is not a positive integer; write it as a plain number ({source})")
    return value


def _said(config: Mapping[str, Any], key: str, source: str) -> int | None:
    """The number under `key`, None where it is absent or null; UserError for a null that builds no model."""
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
