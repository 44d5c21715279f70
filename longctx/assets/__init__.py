"""What ships inside the package: the tiny base model of the quickstart, with its tokenizer."""

from __future__ import annotations

from pathlib import Path


def tiny_model() -> Path:
    """The folder of the tiny Llama, trained by `experiment=tiny_base` at a 512-token window."""
    return Path(__file__).resolve().parent / "tiny"
