"""Next-token scores of a Hugging Face model at a few positions, without ever forming the others' logits."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longctx.config.eval import NeedleConfig
from longctx.eval import needle
from longctx.eval.grid import Grid
from longctx.eval.ground import Ground
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


def grid_of(
    model: Any,
    config: NeedleConfig,
    ground: Ground,
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
        one_process(model), config, ground.writer, ground.haystack,
        label=label, rank=rank, world=world, workers=workers, tick=tick,
    )  # fmt: skip


def load_plain(
    folder: Path | str, rope: dict[str, Any] | None = None, window: int | None = None, dtype: str = "auto"
) -> Any:
    """A model as plain transformers loads it, for inference, on this process's GPU or, without one, on the CPU.

    dtype: auto is the dtype of its weights on a GPU, and float32 on a CPU. rope, window: rope_parameters and
    max_position_embeddings instead of what its config.json says.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    config = AutoConfig.from_pretrained(folder)
    if rope is not None:
        config.rope_parameters = dict(rope)
        config.max_position_embeddings = window
    device = torch.device("cpu")
    if torch.cuda.is_available():
        local = int(os.environ.get("LOCAL_RANK", "0"))
        device = torch.device("cuda", local % torch.cuda.device_count())
    elif dtype == "auto":
        dtype = "float32"
    loader: Any = AutoModelForCausalLM
    model = loader.from_pretrained(folder, config=config, dtype=dtype, attn_implementation="sdpa")
    return model.to(device).eval()
