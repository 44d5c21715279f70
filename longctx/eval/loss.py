"""Loss on held-out text: the mean over windows, and by position inside the window.

A window begins at a line somewhere in a held-out document and goes on with the documents after it, so position p
always has p tokens of text before it, though not always of its own document.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch

    from longctx.eval.ground import Ground


def held_out_rows(ground: Ground, length: int, count: int) -> np.ndarray:
    """The same `count` windows [count, length] of held-out text for every model."""
    rng = np.random.default_rng([7, length])
    return np.stack([ground.haystack(rng, length) for _ in range(count)]).astype(np.int64)


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


def by_position(losses: np.ndarray, bins: int = 16) -> tuple[np.ndarray, np.ndarray]:
    """Mean loss in `bins` equal stretches of the window: (right edges [bins], loss [bins])."""
    edges = np.linspace(0, losses.shape[1], bins + 1).astype(int)
    means = [losses[:, a:b].mean() for a, b in pairwise(edges) if b > a]
    return edges[1:][: len(means)], np.array(means)
