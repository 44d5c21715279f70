"""Next-token scores of a Hugging Face model at a few positions, without ever forming the others' logits."""

from __future__ import annotations

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
