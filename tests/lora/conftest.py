"""Tiny models of each architecture, saved once: a base, its training (longer window) and a fine-tune of the
same base.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from longctx.rope.config import with_rope

os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed, where a model is saved, would say so on standard output

ARCHITECTURES: dict[str, type[PretrainedConfig]] = {
    "llama": LlamaConfig,
    "mistral": MistralConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "gemma": GemmaConfig,
}
ROPE = {"rope_type": "default", "rope_theta": 154243.0}
WINDOW = 2048
IDS = torch.tensor([[1, 5, 9, 2, 33, 7, 60, 4]])


@dataclass(frozen=True)
class Trio:
    base: str
    tuned: str
    sibling: str


def build(architecture: str, *, tied: bool | None = None, seed: int = 0, **changes: Any) -> Any:
    """A random model: 2 layers x 64, 4 heads, 2 kv heads of 16, vocabulary 96."""
    sizes: dict[str, Any] = {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 96, "max_position_embeddings": 512,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "tie_word_embeddings": architecture == "gemma" if tied is None else tied,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    if architecture == "qwen2":
        sizes.pop("head_dim")
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(ARCHITECTURES[architecture](**{**sizes, **changes}))


def change(model: Any, *, seed: int, size: float = 0.02, rank: int | None = None) -> Any:
    """Add to every parameter noise, or a difference of the given rank, in place."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if rank is not None and parameter.dim() == 2:
                left = torch.randn(parameter.shape[0], rank, generator=generator)
                right = torch.randn(rank, parameter.shape[1], generator=generator)
                difference = left @ right / rank**0.5
            else:
                difference = torch.randn(parameter.shape, generator=generator)
            parameter.add_((size * difference).to(parameter.dtype))
    return model


def save(model: Any, path: Path, *, dtype: torch.dtype, rope: bool = False, **how: Any) -> str:
    """Save in dtype; rope: with the longer window in config.json."""
    import json

    model.to(dtype).save_pretrained(path, **how)
    if rope:
        file = path / "config.json"
        file.write_text(json.dumps(with_rope(json.loads(file.read_text()), ROPE, WINDOW)))
    (path / "tokenizer_config.json").write_text('{"model_max_length": 512}')
    return str(path)


@pytest.fixture(scope="session")
def trio(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Trio]:
    """trio(architecture, tied, dtype, rank): made on first use, then shared; nothing may write into it."""
    made: dict[tuple[Any, ...], Trio] = {}

    def make(
        architecture: str = "llama",
        *,
        tied: bool | None = None,
        dtype: torch.dtype = torch.float32,
        rank: int | None = None,
    ) -> Trio:
        key = (architecture, tied, dtype, rank)
        if key not in made:
            folder = tmp_path_factory.mktemp(f"{architecture}-{len(made)}")
            base = save(build(architecture, tied=tied), folder / "base", dtype=dtype)
            tuned = change(build(architecture, tied=tied), seed=1, rank=rank)
            sibling = change(build(architecture, tied=tied), seed=2)
            made[key] = Trio(
                base,
                save(tuned, folder / "tuned", dtype=dtype, rope=True),
                save(sibling, folder / "sibling", dtype=dtype),
            )
        return made[key]

    return make


def load(path: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, dtype="auto").eval()


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=IDS).logits.float()


def tensors(path: str) -> dict[str, torch.Tensor]:
    """Every tensor of a folder, read by the safetensors package rather than by ours."""
    from safetensors.torch import load_file

    found: dict[str, torch.Tensor] = {}
    for file in sorted(Path(path).glob("model*.safetensors")):
        found.update(load_file(file))
    return found
