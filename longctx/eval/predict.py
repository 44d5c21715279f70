"""Next-token scores of a Hugging Face model at a few positions, without ever forming the others' logits."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longctx.config.eval import NeedleConfig
from longctx.eval import needle
from longctx.eval.grid import Grid
from longctx.eval.heldout_text import HeldoutText
from longctx.eval.needle import Predict

if TYPE_CHECKING:
    import torch


def one_process(model: Any) -> Predict:
    """Predict with a plain causal LM of transformers, whatever its family and attention.

    The model's own forward forms the logits, so that soft-capping and scaling are its own too; one that knows no
    `logits_to_keep` forms all of them.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model  # peft's forward hides the names
    keeps = "logits_to_keep" in inspect.signature(inner.forward).parameters

    def predict(tokens: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
        import torch

        with torch.inference_mode():
            device = next(model.parameters()).device
            ids = tokens[None].to(device)
            if keeps:  # an index on the CPU fits whichever device holds the last layer
                return model(input_ids=ids, use_cache=False, logits_to_keep=where).logits[0].float()
            return model(input_ids=ids, use_cache=False).logits[0, where].float()

    return predict


def grid_of(
    model: Any,
    config: NeedleConfig,
    heldout: HeldoutText,
    *,
    label: str,
    rank: int = 0,
    world: int = 1,
    tick: Callable[[], None] = lambda: None,
) -> Grid:
    """A model's needle grid (of several ranks: this one's part): a prompt per thread on a CPU; one after the other
    on a GPU, whose memory one prompt may fill.
    """
    workers = None if next(model.parameters()).device.type == "cpu" else 1
    return needle.grid(
        one_process(model), config, heldout.writer, heldout.haystack,
        label=label, rank=rank, world=world, workers=workers, tick=tick,
    )  # fmt: skip


def load_plain(
    folder: Path | str,
    rope: dict[str, Any] | None = None,
    window: int | None = None,
    device: torch.device | None = None,
    dtype: str = "auto",
) -> Any:
    """A model as plain transformers loads it, for inference.

    rope, window: rope_parameters and max_position_embeddings in place of those of its config.json. device: None takes
    the GPU where there is one. dtype: auto is the dtype of the weights on a GPU, and float32 on a CPU.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    from longctx.model.rotary import give_rope

    logging.disable_progress_bar()
    config = AutoConfig.from_pretrained(folder)
    if rope is not None:
        give_rope(config, rope, window or config.max_position_embeddings)
    elif window is not None:
        config.max_position_embeddings = window
    if device is None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if dtype == "auto" and device.type == "cpu":
        dtype = "float32"
    loader: Any = AutoModelForCausalLM
    model = loader.from_pretrained(folder, config=config, dtype=dtype, attn_implementation="sdpa")
    return model.to(device).eval()
