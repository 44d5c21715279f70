"""Config schemas of `longctx lora extract`, `lora merge`, `lora info` and `bench lora`."""

from __future__ import annotations

import re
from dataclasses import field
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from longctx.config.base import (
    AboveZero,
    AsDtype,
    AsList,
    Count,
    Format,
    Given,
    Layers,
    Number,
    PerMachine,
    Positive,
    Seed,
    ShareAboveZero,
    Text,
    Width,
    Window,
    schema,
)
from longctx.errors import nearest

Adapters = Annotated[list[Given], AsList, Field(min_length=1)]
Scales = Annotated[list[Annotated[Number, Field(ge=-1e15, le=1e15)]], AsList, Field(min_length=1)]
FactorDtype = Annotated[Literal["bfloat16", "float16", "float32"], AsDtype]


def _device(value: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:\d{1,4})?", value):
        raise ValueError("is not a device; write auto, cpu, cuda or cuda:1")
    return value


@schema
class ExtractConfig:
    """The root of configs/lora_extract.yaml. Models are folders in Hugging Face format, or hub ids."""

    base: Given  #: the model before training
    tuned: Given  #: the model after training
    out: Given  #: the adapter's folder
    rank: Positive = 32  #: rank of every factor pair
    #: in place of rank: the smallest rank per module that keeps this share of its squared norm
    share: ShareAboveZero | None = None
    #: in place of rank: the ranks that fit this many MB and keep most; reads the pair twice
    size_mb: AboveZero | None = None
    max_rank: Positive = 256  #: bound of the ranks that share and size_mb choose
    #: tensors carried; serving: layers only, no lm_head, embeddings or norms (what stays behind is listed)
    profile: Literal["full", "serving"] = "full"
    #: whether the adapter carries the embeddings; null: in profile full when they are tied to the output layer
    embeddings: bool | None = None
    lm_head: bool | None = None  #: whether the adapter carries the output layer; null: in profile full
    rslora: bool = False  #: scale by alpha / sqrt(rank) instead of alpha / rank
    dtype: FactorDtype = "bfloat16"  #: dtype of the factors
    precision: Annotated[Literal["float32", "float64"], AsDtype] = "float32"  #: dtype of differences and products
    #: dtype to which the base is rounded before it is subtracted: the training's, where it loaded the base so (an fp16
    #: base is trained in bfloat16); otherwise that rounding counts as change
    base_dtype: Annotated[Literal["stored", "float32", "bfloat16", "float64"], AsDtype] = "stored"
    oversample: Positive = 16  #: columns of the sketch beyond the rank
    power_max: Positive = 8  #: power iterations before the exact SVD is taken
    #: estimated gain of more iterations over the squared residual; 8e-3 leaves residuals within 0.4 % of the optimum
    tolerance: AboveZero = 4e-3
    seed: Seed = 0  #: random seed of the sketches
    device: Annotated[Text, AfterValidator(_device)] = "auto"  #: cpu, cuda or cuda:1; auto: a GPU when there is one
    workers: PerMachine | None = None  #: tensors in flight; null: one per core, at most 8
    #: MiB of differences held at once, all workers together (on a GPU: half of what is free); larger tensors are read
    #: again on every pass
    memory_mib: Positive = 384
    #: MB of the largest file; larger adapters are sharded with an index, and PEFT reads one file only
    max_shard_mb: AboveZero = 5000.0
    #: loss: also compare the losses of base, tuned and base + adapter on text
    verify: Literal["modules", "loss"] = "modules"
    text: Given | None = None  #: for verify=loss: a file that neither model was trained on
    text_tokens: Annotated[Count, Field(ge=2)] = 4096  #: tokens read from text
    text_seq_len: Window = 512  #: tokens of one sequence of text
    #: allow a tuned model with a shorter window than the base, which is refused as a swap of the two
    allow_shorter: bool = False
    format: Format = "text"  #: format of what is printed

    def __post_init__(self) -> None:
        if self.text is not None and self.verify != "loss":
            raise ValueError(f"text={self.text} is read with verify=loss only; add that, or leave text out")


@schema
class MergeRope:
    """The rope a merged model gets."""

    #: rope of the merged model: the adapter's, or the target's own (keep); rope=keep for short
    rule: Literal["adapter", "keep"] = "adapter"
    #: rope theta, given with window for adapters that carry none
    theta: Annotated[AboveZero, Field(gt=1)] | None = None


def _as_rope(value: Any) -> Any:
    """`rope=keep` is short for `rope.rule=keep`."""
    if isinstance(value, str) and value not in ("adapter", "keep"):
        near = nearest(value, ("adapter", "keep"))
        raise ValueError(f"is not adapter or keep{f'; did you mean rope={near}?' if near else ''}")
    return {"rule": value} if isinstance(value, str) else value


@schema
class MergeConfig:
    """The root of configs/lora_merge.yaml."""

    target: Given  #: the fine-tune of the adapter's base
    adapter: Adapters  #: a folder or hub id, or a list of them
    out: Given  #: the merged model's folder
    scale: Scales = field(default_factory=lambda: [1.0])  #: factor of each adapter: one for all, or a list
    rope: Annotated[MergeRope, BeforeValidator(_as_rope)] = field(default_factory=MergeRope)
    window: Window | None = None  #: window in tokens, given with rope.theta for adapters that carry none
    like: Given | None = None  #: a model whose rope and window the merged model gets
    #: lm_head and embeddings whose vocabularies differ: leave them, or merge the rows both have (common)
    vocab: Literal["skip", "common"] = "skip"
    #: embeddings that the merged model gets where an adapter holds other ones of its base than the target has: own, the
    #: target's, or the adapter's
    copies: Literal["own", "adapter"] | None = None
    allow_partial: bool = False  #: merge what fits where layers are missing or unexpected
    format: Format = "text"  #: format of what is printed

    def __post_init__(self) -> None:
        twice = [name for name in self.adapter if self.adapter.count(name) > 1]
        if twice and len(self.scale) == 1:
            raise ValueError(f"adapter names {twice[0]} twice; name it once, scale=2 adds twice its change")
        if self.like is not None and (self.rope.theta is not None or self.window is not None):
            raise ValueError(
                f"like={self.like} gives rope and window, and so do rope.theta and window; leave out one of them"
            )


@schema
class InfoConfig:
    """The root of configs/lora_info.yaml: an adapter to describe, or a plan of one."""

    adapter: Given | None = None  #: a folder or hub id
    #: in place of adapter: a model to plan one for, a folder or a name such as llama3_8b, qwen3_8b
    plan: Given | None = None
    rank: Positive = 32  #: rank of the planned adapter
    #: whether the planned adapter carries the embeddings; null: when they are tied to the output layer, as in extract
    embeddings: bool | None = None
    lm_head: bool = True  #: whether the planned adapter carries the output layer
    dtype: FactorDtype = "bfloat16"  #: dtype of the planned factors
    plots: Given | None = None  #: a folder for PNGs: spectra, and share kept per layer and projection
    measure: bool = True  #: time a small extraction here and extrapolate
    format: Format = "text"  #: format of what is printed


@schema
class BenchLoraConfig:
    """The root of configs/bench_lora.yaml."""

    mergekit: Given | None = None  #: mergekit-extract-lora in its own environment; without it ours is measured alone
    rank: Positive = 32  #: rank of the adapter
    layers: Layers = 12  #: layers of the pair of models that is made
    hidden: Width = 1024  #: hidden width of the pair
    vocab: Width = 32000  #: vocabulary size of the pair
    delta_rank: Positive = 32  #: rank of the difference of the pair, besides noise
    threads: PerMachine = 2  #: CPU threads of each process
    repeats: Positive = 2  #: runs of our extraction; two are also compared byte by byte
    #: also measure a pair of so few layers, to see that memory does not grow with depth; null: skip
    shallow: Layers | None = 3
    exact: bool = True  #: also compute the exact optimum's residual, with one SVD per kind of matrix
    folder: Given | None = None  #: folder in which the pair is made and kept; null: a temporary one
    out: Given | None = None  #: a JSON file for the figures
    format: Format = "text"  #: format of what is printed
