"""The adapter of a run, and the sibling it is merged into."""

from __future__ import annotations

from pathlib import Path

from longctx.config.lora import ExtractConfig, MergeConfig
from longctx.config.train import TrainConfig


def extract_adapter(config: TrainConfig, tuned: Path, out: Path) -> None:
    """Write tuned - base as a LoRA to `out`, once."""
    if out.exists():
        return
    from longctx.lora.extract import extract

    hook = config.hooks.lora
    extract(
        ExtractConfig(
            base=str(config.model.path), tuned=str(tuned), out=str(out), rank=hook.rank, profile=hook.profile,
            embeddings=hook.embeddings, dtype="float32" if config.model.dtype == "float32" else "bfloat16",
        )
    )  # fmt: skip


def merge_sibling(sibling: Path, adapter: Path, out: Path) -> None:
    """Write sibling + adapter to `out`, once; theta and window come from the adapter."""
    if out.exists():
        return
    from longctx.lora.merge import merge

    merge(MergeConfig(target=str(sibling), adapter=[str(adapter)], out=str(out)))
