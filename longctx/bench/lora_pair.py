"""Make a base and a tuned model for measuring LoRA extraction: Llama's shapes, random weights, a known difference.

The difference of every matrix has `delta_rank` directions of falling strength and dense noise, so the best possible
residual is not zero and the directions are not trivial to find.
"""

from __future__ import annotations

from pathlib import Path

import torch

from longctx.storage.files import write_json
from longctx.storage.writer import SafetensorsWriter


def make_pair(
    folder: Path, *, layers: int, hidden: int, vocab: int, delta_rank: int, seed: int = 0
) -> tuple[Path, Path]:
    """Write FOLDER/base and FOLDER/tuned (bf16); heads have 64 dimensions, and a quarter of them are KV heads."""
    head_dim, heads = 64, max(4, hidden // 64)
    kv, inner = max(1, heads // 4) * head_dim, 11 * hidden // 4
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv // head_dim,
        "head_dim": head_dim,
        "vocab_size": vocab,
        "tie_word_embeddings": False,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "max_position_embeddings": 8192,
        "rope_theta": 500000.0,
        "torch_dtype": "bfloat16",
    }
    one_layer: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj": (heads * head_dim, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, heads * head_dim),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for layer in range(layers):
        shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in one_layer.items()}
    shapes |= {"model.norm.weight": (hidden,), "lm_head.weight": (vocab, hidden)}
    base, tuned = folder / "base", folder / "tuned"
    generator = torch.Generator().manual_seed(seed)
    writers = []
    for path, changes in ((base, {}), (tuned, {"rope_theta": 15296098.0, "max_position_embeddings": 65536})):
        path.mkdir(parents=True)
        write_json(path / "config.json", {**config, **changes})
        writers.append(SafetensorsWriter(path / "model.safetensors", shapes))
    for name, shape in shapes.items():
        weight = torch.randn(shape, generator=generator).mul_(0.02)
        for writer, tensor in zip(writers, (weight, _tuned(weight, delta_rank, generator)), strict=True):
            writer.add(name, tensor.bfloat16())
    for writer in writers:
        writer.close()
    return base, tuned


def _tuned(weight: torch.Tensor, rank: int, generator: torch.Generator) -> torch.Tensor:
    """Return the tuned weight: a difference of `rank` directions with 2 % of the weight's norm, and 0.3 % noise.

    The singular values of the difference fall from 1 to 0.05 before they are scaled. Vectors get the noise alone.
    """
    noise = torch.randn(weight.shape, generator=generator)
    noise *= 3e-3 * torch.linalg.vector_norm(weight) / torch.linalg.vector_norm(noise)
    if weight.dim() == 1:
        return weight + noise
    rows, columns = weight.shape
    strengths = torch.logspace(0, -1.3, min(rank, rows, columns))
    left = torch.randn(rows, len(strengths), generator=generator) / rows**0.5
    right = torch.randn(len(strengths), columns, generator=generator) / columns**0.5
    strengths *= 0.02 * torch.linalg.vector_norm(weight) / torch.linalg.vector_norm(strengths)
    return weight + noise + (left * strengths) @ right
