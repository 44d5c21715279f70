"""Compute next-token logits of a Hugging Face model at a few positions of a prompt, without those of the others."""

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
from longctx.storage import hub
from longctx.storage.model import FAMILIES

if TYPE_CHECKING:
    import torch


def one_process(model: Any) -> Predict:
    """Make a Predict function of a causal language model of transformers, with any architecture and attention.

    The model's own forward computes the logits, so its soft-capping and scaling apply. A model whose forward has no
    argument `logits_to_keep` computes the logits of all positions, and one of `load_plain` computes its last layer's
    attention at the few positions only.
    """
    from longctx.eval.last_layer import only_at

    inner = (
        model.get_base_model() if hasattr(model, "get_base_model") else model
    )  # the signature of peft's forward hides the argument
    keeps = "logits_to_keep" in inspect.signature(inner.forward).parameters

    def predict(tokens: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
        import torch

        with torch.inference_mode(), only_at(where):
            device = next(model.parameters()).device
            ids = tokens[None].to(device)
            places = where - len(tokens)  # from the end: peft's virtual tokens come before the prompt
            if keeps:  # an index on the CPU works for a last layer on any device
                return model(input_ids=ids, use_cache=False, logits_to_keep=places).logits[0].float()
            return model(input_ids=ids, use_cache=False).logits[0, places].float()

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
    """Measure this rank's part of a model's needle grid, with one prompt per thread on a CPU.

    On a GPU, prompts are computed one after the other, because one may fill the memory.
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
    """Load a model for inference with plain transformers.

    rope, window: rope_parameters and max_position_embeddings that replace those of config.json. device: None takes
    the GPU if there is one. dtype: auto takes the dtype of the weights on a GPU and float32 on a CPU.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    from longctx.eval.last_layer import attention_name
    from longctx.model.rotary import give_rope

    logging.disable_progress_bar()
    config = AutoConfig.from_pretrained(folder)
    config.return_dict, config.output_hidden_states, config.output_attentions = True, False, False
    if rope is not None:
        give_rope(config, rope, window or config.max_position_embeddings)
    elif window is not None:
        config.max_position_embeddings = window
    if device is None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if dtype == "auto" and device.type == "cpu":
        dtype = "float32"
    loader: Any = AutoModelForCausalLM
    with hub.fetching(str(folder), "model.path", OSError):
        # Only in these families is it known that a decoder's last layer is attention as `last_layer` expects it.
        attention = attention_name() if config.model_type in FAMILIES else "sdpa"
        model = loader.from_pretrained(folder, config=config, dtype=dtype, attn_implementation=attention)
    return model.to(device).eval()
