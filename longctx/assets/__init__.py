"""Files in the package: the tiny base model of the quickstart, with its tokenizer."""

from __future__ import annotations

from pathlib import Path


def tiny_model() -> Path:
    """Return the folder of the tiny Llama, which `experiment=tiny_base` trains with a window of 512 tokens."""
    return Path(__file__).resolve().parent / "tiny"
