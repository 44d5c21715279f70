"""`extract_lora` and `merge_lora`: the difference of two models as a LoRA, and into another model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longctx.errors import UserError

if TYPE_CHECKING:
    from longctx.lora.extract import ExtractResult
    from longctx.lora.merge import MergeResult


def extract_lora(base: str | Path, tuned: str | Path, out: str | Path, rank: int = 32, **options: Any) -> ExtractResult:
    """Write the difference of two models as a LoRA in PEFT's format.

    base, tuned: folders or hub ids in Hugging Face format, before and after the extension. out: the adapter's folder,
    which must not exist. rank: LoRA rank of every module. options: any other key of configs/lora_extract.yaml, among
    them share (keep this share of each module's squared norm instead), size_mb, profile ("full" or "serving"),
    dtype ("bfloat16"), allow_shorter.

    Each difference is taken in fp32 and cut by a randomized SVD (arXiv 0909.4061); the file also carries rope, window
    and norms, and is read back and compared. Needs neither peft nor transformers; memory does not grow with depth.
    Returns an ExtractResult: out, rank, rows (one per tensor: norm, share kept, residual), extension (rope and
    window), bytes, share. Raises UserError for a pair that has no meaningful difference, and leaves nothing behind.

    >>> import longctx
    >>> result = longctx.extract_lora(MODEL, TUNED, OUT + "/adapter", rank=8)
    >>> result.rank, result.extension.base_window, result.extension.window
    (8, 512, 2048)
    """
    from longctx.config.base import build
    from longctx.config.lora import ExtractConfig
    from longctx.lora.extract import extract

    _check_paths("extract_lora", base=base, tuned=tuned, out=out)
    values = {"base": str(base), "tuned": str(tuned), "out": str(out), "rank": rank, **options}
    return extract(build(ExtractConfig, values, origin="extract_lora"))


def merge_lora(
    target: str | Path,
    adapter: str | Path | Sequence[str | Path],
    out: str | Path,
    scale: float | Sequence[float] = 1.0,
    **options: Any,
) -> MergeResult:
    """Add an adapter to a model and give the model the adapter's rope and window.

    target: the adapter's base or a fine-tune of it, a folder or hub id. adapter: what `extract_lora` wrote or any PEFT
    LoRA, one or several. out: the merged model's folder, which must not exist. scale: factor of the difference, one or
    one per adapter. options: any other key of configs/lora_merge.yaml, among them rope="keep", vocab="common",
    allow_partial, like.

    W + scale x alpha / rank x B A (arXiv 2106.09685), summed in fp32 and cast once, tensor by tensor. Returns a
    MergeResult: out, applied, skipped and untouched tensors, rope, window (tokens), notes. Raises UserError where any
    part of the adapter does not fit, and leaves nothing behind.

    >>> import longctx
    >>> adapter = longctx.extract_lora(MODEL, TUNED, OUT + "/adapter", rank=8)
    >>> merged = longctx.merge_lora(MODEL, adapter.out, OUT + "/merged")
    >>> merged.window, merged.skipped
    (2048, [])
    """
    from longctx.config.base import build
    from longctx.config.lora import MergeConfig
    from longctx.lora.merge import merge

    adapters = list(adapter) if isinstance(adapter, Sequence) and not isinstance(adapter, str) else [adapter]
    _check_paths("merge_lora", target=target, out=out)
    for one in adapters:
        _check_paths("merge_lora", adapter=one)
    values = {"target": str(target), "adapter": [str(one) for one in adapters], "out": str(out), "scale": scale}
    return merge(build(MergeConfig, {**values, **options}, origin="merge_lora"))


def _check_paths(caller: str, **values: Any) -> None:
    """Raise UserError unless all are folders or hub ids: a model in memory is none."""
    for name, value in values.items():
        if not isinstance(value, str | Path):
            raise UserError(
                f"{caller}: {name} is a {type(value).__name__} and not a folder or hub id; write a model or adapter "
                "with save_pretrained(FOLDER) and give its folder"
            )
