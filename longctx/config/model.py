"""Which model, how it is loaded, and what its training may keep in memory.

A model is a folder or hub id in Hugging Face format (`path`) or drawn at random from a shape (`init`), never
both. The memory dials say what one device holds between forward and backward; none of them changes a result.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

from longctx.config.base import Length, Text, schema

_SPELLINGS = {
    "bf16": "bfloat16", "fp32": "float32", "f32": "float32", "float": "float32", "single": "float32",
    "fp64": "float64", "f64": "float64", "double": "float64",
}  # fmt: skip


def parse_dtype(value: Any) -> Any:
    """Spellings such as bf16, fp32 and torch.bfloat16; ValueError for half precision, which training does not know."""
    if not isinstance(value, str):
        return value
    name = value.strip().lower().removeprefix("torch.")
    if name in ("float16", "fp16", "f16", "half"):
        raise ValueError(
            "is not trained: its numbers end at 65,504 and gradients would have to be scaled; write bfloat16, which is "
            "as large and has the range of float32"
        )
    return _SPELLINGS.get(name, name)


Dtype = Annotated[Literal["auto", "float32", "bfloat16", "float64"], BeforeValidator(parse_dtype)]
# In order of preference; longctx.attention.kernels holds the kernels themselves.
KernelName = Literal["flash_attn_3", "flash_attn_2", "cudnn", "torch_flash", "torch_cpu", "reference"]
Precision = Literal["float32", "float64"]
Family = Literal["llama", "mistral", "qwen2", "qwen3", "gemma"]


@schema
class MemoryConfig:
    """What is kept for the backward pass and how large the pieces are; docs/memory.md has the formulas.

    checkpoint: recompute every layer from its input, its attention output and lse; false keeps everything.
    keep_matmuls: the last n layers also keep what their matrix products gave (the dial towards speed);
    "auto" takes as many as `budget_gib` allows for all that is saved from forward to backward.
    ffn_block: tokens that go through o_proj and the feed-forward block at once (0: all of them).
    loss_chunk: tokens whose logits exist at once. offload: keep the saved tensors in host memory.
    """

    checkpoint: bool = True
    keep_matmuls: int | Literal["auto"] = 0
    budget_gib: float | None = None
    ffn_block: int = 2048
    loss_chunk: int = 512
    offload: bool = False

    def __post_init__(self) -> None:
        if self.ffn_block < 0 or self.loss_chunk < 1:
            raise ValueError(
                f"ffn_block={self.ffn_block} must be 0 (all tokens) or more and loss_chunk={self.loss_chunk} 1 or more"
            )
        if self.keep_matmuls == "auto" and self.budget_gib is None:
            raise ValueError("keep_matmuls=auto needs budget_gib: the GiB of a device that saved tensors may take")
        if self.keep_matmuls != "auto" and self.keep_matmuls < 0:
            raise ValueError(f"keep_matmuls={self.keep_matmuls} must be 0 or more layers, or auto")
        if not self.checkpoint and (self.keep_matmuls or self.offload):
            raise ValueError(
                "checkpoint=false keeps everything on the device, so keep_matmuls and offload do not apply"
            )


@schema
class InitConfig:
    """A model drawn at random; the shape's names are those of a paper rather than of a config.json.

    head_dim: None divides hidden by heads. window: the length the theta was made for.
    """

    family: Family = "llama"
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    ffn: int
    vocab: int
    head_dim: int | None = None
    theta: float = 10000.0
    window: Length = 512
    tie_embeddings: bool = False
    norm_eps: float = 1e-5
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("layers", "hidden", "heads", "kv_heads", "ffn", "vocab"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be 1 or more")
        if self.heads % self.kv_heads:
            raise ValueError(f"heads={self.heads} is not a multiple of kv_heads={self.kv_heads}")
        if self.head_dim is None and self.hidden % self.heads:
            raise ValueError(
                f"hidden={self.hidden} is not a multiple of heads={self.heads}; change one of them or give head_dim"
            )
        if (self.head_dim or self.hidden // self.heads) % 2:
            raise ValueError("head_dim must be even: rotary embeddings turn pairs of dimensions")


@schema
class ModelConfig:
    """The model of a run. tokenizer: a folder or hub id; None looks in `path`.

    dtype: of the weights; auto: what config.json says (longctx.dtype). attention: who attends; attention_kernel: by
    which of longctx's kernels; auto: the first in order of preference that serves, but on a GPU never `reference`.
    rotary: precision in which angles are formed; float32 is what transformers and vLLM serve with, float64 is
    exact at positions beyond 2^20 (docs/memory.md has the measured difference).
    """

    path: Text | None = None
    init: InitConfig | None = None
    tokenizer: Text | None = None
    dtype: Dtype = "auto"
    attention: Literal["longctx", "sdpa", "eager"] = "longctx"
    attention_kernel: Literal["auto"] | KernelName = "auto"
    rotary: Precision = "float32"
    memory: MemoryConfig = MemoryConfig()

    def __post_init__(self) -> None:
        if (self.path is None) == (self.init is None):
            given = "both path and init are" if self.path is not None else "neither path nor init is"
            raise ValueError(f"{given} given; a model is either loaded (path=...) or drawn (init.layers=...)")
