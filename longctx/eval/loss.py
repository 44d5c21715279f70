"""Loss on held-out text: the mean over windows, and by position inside the window.

Every window is a whole document's beginning, so position p always has p tokens of real context behind it.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch


def windows(stream: np.ndarray, length: int, count: int, seed: int) -> np.ndarray:
    """`count` stretches of `length` tokens [count, length] of a held-out stream, at places drawn from seed."""
    rng = np.random.default_rng([seed, length])
    starts = rng.integers(0, max(1, len(stream) - length), size=count)
    return np.stack([np.resize(np.asarray(stream[s : s + length], np.int64), length) for s in starts])


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
