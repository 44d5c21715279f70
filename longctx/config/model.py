"""Which model, how it is loaded, and what its training may keep in memory.

A model is a folder or hub id in Hugging Face format (`path`) or drawn at random from a shape (`init`), never
both. The memory dials say what one device holds between forward and backward; none of them changes a result.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from longctx.config.base import (
    AboveZero,
    AsDtype,
    Epsilon,
    Given,
    HeadDim,
    Layers,
    NotNegative,
    Positive,
    Seed,
    Width,
    Window,
    ZeroOrMore,
    schema,
)

Dtype = Annotated[Literal["auto", "float32", "bfloat16", "float64"], AsDtype]
# In order of preference; longctx.attention.kernels holds the kernels themselves.
KernelName = Literal["flash_attn_3", "flash_attn_4", "cudnn", "flash_attn_2", "torch_flash", "torch_cpu", "reference"]
Precision = Annotated[Literal["float32", "float64"], AsDtype]
Fused = Literal["auto", "off", "liger"]
Family = Literal["llama", "mistral", "qwen2", "qwen3", "gemma"]


@schema
class MemoryConfig:
    """What is kept for the backward pass and how large the pieces are; docs/memory.md has the formulas."""

    #: recompute every layer from its input, its attention output and lse; false keeps all
    activation_checkpointing: bool = True
    #: keep attention outputs and lse; false: recompute in full, where a layer keeps only its input and its attention
    #: runs forward twice a step
    keep_attention: bool = True
    #: last layers that also keep their matrix products: faster, more memory; auto: as many as budget_gib holds
    keep_matmuls: NotNegative | Literal["auto"] = 0
    budget_gib: ZeroOrMore | None = None  #: GiB of a device that saved tensors may take, for keep_matmuls=auto
    #: tokens that go through o_proj and the feed-forward block at once; 0: all; auto: 2048 on a CPU, 8192 on a GPU
    ffn_block: NotNegative | Literal["auto"] = "auto"
    #: tokens whose logits exist at once; auto: 512 on a CPU, 4096 on a GPU
    loss_chunk: Positive | Literal["auto"] = "auto"
    offload_activations: bool = False  #: keep the saved tensors in host memory
    #: operators for norms, rotation, gated activation and softmax on a GPU: liger-kernel's, or torch's (off); auto:
    #: liger-kernel's where it is installed and agrees with torch's operators on the device
    fused: Fused = "auto"

    def __post_init__(self) -> None:
        if self.keep_matmuls == "auto" and self.budget_gib is None:
            raise ValueError("keep_matmuls=auto needs budget_gib: the GiB of a device that saved tensors may take")
        if not self.activation_checkpointing and (
            self.keep_matmuls or self.offload_activations or not self.keep_attention
        ):
            raise ValueError(
                "activation_checkpointing=false keeps everything on the device, so keep_attention=false, keep_matmuls "
                "and offload_activations do not apply"
            )
        if self.keep_matmuls and not self.keep_attention:
            raise ValueError(
                f"keep_attention=false recomputes whole layers, so keep_matmuls={self.keep_matmuls} does not apply; "
                "attention is dearer to repeat than products: keep it first"
            )


@schema
class InitConfig:
    """A model drawn at random; the shape's names are those of a paper rather than of a config.json."""

    family: Family = "llama"  #: the architecture, as transformers names it
    layers: Layers  #: decoder layers
    hidden: Width  #: width of the residual stream
    heads: Width  #: query heads
    kv_heads: Width  #: key and value heads, which query heads share
    ffn: Width  #: inner width of the feed-forward block
    vocab: Width  #: rows of the embedding
    head_dim: HeadDim | None = None  #: dimension of a head; null: hidden / heads
    theta: Annotated[AboveZero, Field(gt=1)] = 10000.0  #: base of the rotary frequencies
    window: Window = 512  #: window that theta was made for, in tokens
    tie_embeddings: bool = False  #: the output layer is the embedding
    norm_eps: Epsilon = 1e-5  #: added to the variance in RMSNorm
    seed: Seed = 0  #: random seed of the weights

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads:
            raise ValueError(f"heads={self.heads} is not a multiple of kv_heads={self.kv_heads}")
        if self.head_dim is None and self.hidden % self.heads:
            raise ValueError(
                f"hidden={self.hidden} is not a multiple of heads={self.heads}; change one of them or give head_dim"
            )
        if self.head_dim is None and self.hidden // self.heads % 2:
            raise ValueError(
                f"hidden={self.hidden} over heads={self.heads} is a head_dim of {self.hidden // self.heads}, which "
                "must be even: rotary embeddings turn pairs of dimensions; change one of them or give head_dim"
            )


@schema
class ModelConfig:
    """The model of a run: loaded (path) or drawn at random (init)."""

    path: Given | None = None  #: the model: a folder or hub id in Hugging Face format
    init: InitConfig | None = None
    tokenizer: Given | None = None  #: a folder or hub id; null: the model's own
    dtype: Dtype = "auto"  #: dtype of the weights; auto: that of config.json; bfloat16 has float32 masters
    #: implementation of attention; sdpa and eager: transformers' own, one rank only
    attention: Literal["longctx", "sdpa", "eager"] = "longctx"
    #: which of longctx's kernels attends; auto: the first that serves, on a GPU never `reference`. What a kernel
    #: leaves of single calls (cuDNN: short documents) goes to the next that serves
    attention_kernel: Literal["auto"] | KernelName = "auto"
    #: precision in which angles are formed; float32 is what transformers and vLLM serve with, float64 is exact at
    #: positions beyond 2^20 (docs/memory.md has the measured difference)
    rotary: Precision = "float32"
    memory: MemoryConfig = MemoryConfig()

    def __post_init__(self) -> None:
        if (self.path is None) == (self.init is None):
            given = "both path and init are" if self.path is not None else "neither path nor init is"
            raise ValueError(f"{given} given; a model is either loaded (path=...) or drawn (init.layers=...)")
