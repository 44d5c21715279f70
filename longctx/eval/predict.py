"""Next-token scores of a Hugging Face model at a few positions, without ever forming the others' logits."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from longctx.eval.needle import Predict

if TYPE_CHECKING:
    import torch


def one_process(model: Any) -> Predict:
    """Predict with a plain model, whatever attention it was loaded with."""

    def predict(tokens: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
        import torch

        with torch.inference_mode():
            device = next(model.parameters()).device
            hidden = model.base_model(input_ids=tokens[None].to(device), use_cache=False).last_hidden_state
            return model.get_output_embeddings()(hidden[0, where.to(device)]).float()

    return predict


def load_plain(folder: Path | str, rope: dict[str, Any] | None = None, window: int | None = None) -> Any:
    """A model as plain transformers loads it, in float32, for inference.

    rope, window: rope_parameters and max_position_embeddings instead of what its config.json says.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    config = AutoConfig.from_pretrained(folder)
    if rope is not None:
        config.rope_parameters = dict(rope)
        config.max_position_embeddings = window
    model = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=torch.float32, attn_implementation="sdpa")
    return model.eval()
