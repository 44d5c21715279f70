"""Loss on held-out text: the mean over windows, and by position inside a window.

A window begins at a line somewhere in a held-out document and goes on with the documents after it, so position p
always has p tokens of text before it, though not always of its own document.
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
    """The same `count` windows [count, length] of held-out text for every model."""
    rng = np.random.default_rng([7, length])
    return np.stack([heldout.haystack(rng, length) for _ in range(count)]).astype(np.int64)


def token_losses(
    model: Any, rows: np.ndarray, *, chunk: int = 2048, tick: Callable[[], None] = lambda: None
) -> np.ndarray:
    """Negative log likelihood [count, length - 1] of each token given those before it; fp32.

    Logits are formed for `chunk` tokens at a time.
    """
    import torch

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
    """Mean loss by position in buckets that double: {last position of the bucket: nats per token}.

    losses: [count, L - 1] of token_losses. Positions count from 1; the buckets are 1 to 64, 65 to 128, 129 to 256
    and so on, the last one ends at L. Position 1 has no loss.
    """
    length = losses.shape[1] + 1
    ends = [0]
    while ends[-1] < length:
        ends.append(min(max(2 * ends[-1], FIRST_BUCKET), length))
    return {end: float(losses[:, max(start - 1, 0) : end - 1].mean()) for start, end in pairwise(ends)}
