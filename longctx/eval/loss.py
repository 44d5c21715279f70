"""Loss on held-out text: the mean over sequences, and by position within a sequence.

A sequence begins at a line in a held-out document and continues with the documents after it. So position p always has
p tokens before it, though not always of its own document.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

FIRST_BUCKET = 64  # positions in the first bucket of `by_position`

if TYPE_CHECKING:
    import torch

    from longctx.eval.heldout_text import HeldoutText


def held_out_rows(heldout: HeldoutText, length: int, count: int) -> np.ndarray:
    """Draw `count` sequences of held-out text, int64 [count, length], the same ones for every model."""
    rng = np.random.default_rng([7, length])
    return np.stack([heldout.haystack(rng, length) for _ in range(count)]).astype(np.int64)


def token_losses(
    model: Any, rows: np.ndarray, *, chunk: int = 2048, tick: Callable[[], None] = lambda: None
) -> np.ndarray:
    """Compute the negative log likelihood of each token given those before it, float32 [count, length - 1].

    rows: int64 [count, length]. Logits are computed for `chunk` tokens at a time, to save memory. Raises UserError for
    a family that longctx does not train: its forward may scale or cap the logits after the output layer.
    """
    import torch

    from longctx.model.architectures import check_config

    check_config(model.config, getattr(model.config, "name_or_path", "") or type(model).__name__)
    found = np.empty((len(rows), rows.shape[1] - 1), np.float32)
    device = next(model.parameters()).device
    head = model.get_output_embeddings()
    with torch.inference_mode():
        for i, row in enumerate(rows):
            tokens = torch.from_numpy(row).to(device)
            hidden = model.base_model(input_ids=tokens[None], use_cache=False).last_hidden_state[0, :-1]
            pieces = [
                _nll(head(part), labels)
                for part, labels in zip(hidden.split(chunk), tokens[1:].split(chunk), strict=True)
            ]
            found[i] = torch.cat(pieces).cpu().numpy()
            tick()
    return found


def _nll(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    import torch

    return torch.nn.functional.cross_entropy(logits.float(), labels, reduction="none")


def by_position(losses: np.ndarray) -> dict[int, float]:
    """Average the losses over buckets of positions; returns {last position of a bucket: nats per token}.

    losses: [count, L - 1] from token_losses. Positions count from 1. The buckets are 1 to 64, 65 to 128, 129 to 256
    and so on; the last one ends at L. Position 1 has no loss.
    """
    length = losses.shape[1] + 1
    ends = [0]
    while ends[-1] < length:
        ends.append(min(max(2 * ends[-1], FIRST_BUCKET), length))
    return {end: float(losses[:, max(start - 1, 0) : end - 1].mean()) for start, end in pairwise(ends)}
