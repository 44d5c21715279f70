"""What `lora-extract`, `lora-merge`, `lora-info` and `bench lora` can be told."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from longctx.config.base import Format, Length, Text, schema
from longctx.errors import nearest


def _as_list(value: Any) -> Any:
    return value if isinstance(value, list) else [value]


Texts = Annotated[list[Text], BeforeValidator(_as_list)]
Numbers = Annotated[list[float], BeforeValidator(_as_list)]
Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(gt=0, le=1)]


@schema
class ExtractConfig:
    """base and tuned: folders in Hugging Face format, or hub ids. out: the adapter's folder."""

    base: Text
    tuned: Text
    out: Text
    rank: Positive = 32
    # Instead of one rank: the smallest rank per module that keeps this share of the squared norm ...
    share: Share | None = None
    # ... or the ranks that together fit this size and keep most; both are bounded by max_rank.
    size_mb: Annotated[float, Field(gt=0)] | None = None
    max_rank: Positive = 256
    profile: Literal["full", "serving"] = "full"
    # None: with tied embeddings in profile full (they are the output layer too), else not.
    embeddings: bool | None = None
    lm_head: bool | None = None
    rslora: bool = False
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    precision: Literal["float32", "float64"] = "float32"
    oversample: Positive = 16
    power_max: Positive = 8
    # Estimated gain of more iterations over the squared residual: 8e-3 leaves residuals within 0.4 % of the
    # optimum.
    tolerance: Annotated[float, Field(gt=0)] = 4e-3
    seed: int = 0
    device: Text = "auto"
    workers: Positive | None = None
    # MiB of differences held at once, all workers together (on a GPU: half of what is free); larger tensors
    # are read again on every pass.
    memory_mib: Positive = 384
    max_shard_mb: Annotated[float, Field(gt=0)] = 5000
    verify: Literal["modules", "loss"] = "modules"
    text: Text | None = None
    text_tokens: Length = 4096
    text_window: Length = 512
    allow_shorter: bool = False
    format: Format = "text"


@schema
class MergeRope:
    """The rope a merged model gets: the adapter's, the target's own (`keep`), or a theta given here."""

    rule: Literal["adapter", "keep"] = "adapter"
    theta: Annotated[float, Field(gt=1)] | None = None


def _as_rope(value: Any) -> Any:
    """`rope=keep` is short for `rope.rule=keep`."""
    if isinstance(value, str) and value not in ("adapter", "keep"):
        near = nearest(value, ("adapter", "keep"))
        raise ValueError(f"is not adapter or keep{f'; did you mean rope={near}?' if near else ''}")
    return {"rule": value} if isinstance(value, str) else value


@schema
class MergeConfig:
    """target: the sibling; adapter: one folder or hub id, or a list; out: the merged model's folder."""

    target: Text
    adapter: Texts
    out: Text
    scale: Numbers = field(default_factory=lambda: [1.0])
    rope: Annotated[MergeRope, BeforeValidator(_as_rope)] = field(default_factory=MergeRope)
    window: Length | None = None
    like: Text | None = None
    vocab: Literal["skip", "common"] = "skip"
    allow_partial: bool = False
    format: Format = "text"


@schema
class InfoConfig:
    """adapter: a folder to describe; or plan: a preset or model folder whose adapter's size is to be worked
    out.
    """

    adapter: Text | None = None
    plan: Text | None = None
    rank: Positive = 32
    embeddings: bool = False
    lm_head: bool = True
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    plots: Text | None = None
    measure: bool = True
    format: Format = "text"


@schema
class BenchLoraConfig:
    """mergekit: path of the mergekit-extract-lora executable in its own environment; without it ours runs
    alone.
    """

    mergekit: Text | None = None
    rank: Positive = 32
    layers: Positive = 12
    hidden: Positive = 1024
    vocab: Positive = 32000
    delta_rank: Positive = 32
    threads: Positive = 2
    repeats: Positive = 2
    shallow: Positive | None = 3
    exact: bool = True
    folder: Text | None = None
    out: Text | None = None
    format: Format = "text"
