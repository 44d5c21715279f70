"""Floating point operations of a training step, for MFU and HFU.

MFU (PaLM, Chowdhery et al. 2204.02311, appendix B): forward and backward of every matrix product, 6 per
weight and token, plus attention. Attention is counted causally and per document, as it is computed: a
query-key pair costs 4 H D in the forward (scores and values, 2 each) and twice that in the backward; PaLM's
formula counts the full square and would flatter long sequences. The embedding's gather is free, the head's
product is not. HFU adds what is recomputed on purpose: with activation checkpointing every layer's products
run forward once more, and the flash backward forms the scores again (2 H D per pair); the attention forward
itself is kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

# Dense bf16 peak of one device, FLOP/s: vendors' data sheets, without sparsity.
PEAK = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "B200": 2250e12,
    "A6000": 155e12,
    "RTX 4090": 165e12,
}


@dataclass(frozen=True)
class Flops:
    """Per model. matmul_weights: weights used in matrix products, the head included; layer_weights: without
    it.

    pair: heads x head size, summed over layers.
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
        again = 2.0 * self.layer_weights * tokens if self.recompute else 0.0
        return self.model(tokens, pairs) + again + 2.0 * self.pair * pairs


def of_model(config: Any, parameters: int, *, recompute: bool) -> Flops:
    """config: the Hugging Face config of a decoder; parameters: all of its weights."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    table = config.vocab_size * config.hidden_size
    tied = bool(getattr(config, "tie_word_embeddings", False))
    layers = parameters - table * (1 if tied else 2)
    pair = config.num_hidden_layers * config.num_attention_heads * head_dim
    return Flops(layers + table, layers, pair, recompute)


def peak_flops(device_name: str | None, override_tflops: float | None) -> float | None:
    """Peak of one device in FLOP/s; None when it is not known (MFU is then left out)."""
    if override_tflops is not None:
        return override_tflops * 1e12
    for name, peak in PEAK.items():
        if device_name and all(word in device_name for word in name.split()):
            return peak
    return None
