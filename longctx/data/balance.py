"""The order of documents within a sequence that spreads attention work evenly over zigzag ranks.

In the zigzag layout rank r of R holds chunks r and 2R-1-r of 2R, which balances one causal document and not
several of uneven lengths: the loads' max / mean is 1.25 on average over 8 ranks for shuffled documents at
8,192 tokens and 1.07 for the best of eight orders (docs/data.md). Data knows nothing of ranks, so the order
is chosen for 4 and 16 at once. P documents, E orders.
"""

from __future__ import annotations

import numpy as np

_ORDERS = 8
_REFERENCES = (4, 16)  # ranks; the finest must be a multiple of the others


def balanced_order(lengths: np.ndarray, seq_len: int, rng: np.random.Generator) -> np.ndarray:
    """int64 [P]: the most even of eight orders, seven random ones and the mirrored one (long documents at
    both ends, which pairs equal lengths at mirrored places)."""
    count = len(lengths)
    if count < 2:
        return np.arange(count)
    orders = np.argsort(rng.random((_ORDERS, count)), axis=1)
    falling = np.argsort(-lengths, kind="stable")
    orders[-1] = np.concatenate([falling[0::2], falling[1::2][::-1]])
    return orders[int(np.argmin(imbalances(lengths[orders], seq_len)))]


def imbalances(lengths: np.ndarray, seq_len: int) -> np.ndarray:
    """float64 [E]: mean over the reference rank counts of max / mean query-key pairs, for documents of
    lengths[e] in this order (int [E, P])."""
    orders = len(lengths)
    finest = 2 * max(_REFERENCES)
    ends = np.cumsum(lengths, axis=1, dtype=np.int64)
    pairs = np.cumsum(lengths * (lengths.astype(np.int64) + 1) // 2, axis=1)
    edges = np.minimum(np.arange(1, finest + 1) * seq_len // finest, ends[0, -1])
    # the document at each edge, for all orders in one search: order e is shifted by e sequences
    shift = np.arange(orders)[:, None] * np.int64(seq_len + 1)
    document = np.searchsorted((ends + shift).ravel(), (edges + shift).ravel(), side="left")
    into = np.tile(edges, orders) - (ends - lengths).ravel()[document]
    own = lengths.ravel()[document].astype(np.int64)
    before = pairs.ravel()[document] - own * (own + 1) // 2
    done = (before + into * (into + 1) // 2).reshape(orders, finest)
    chunks = np.diff(done, axis=1, prepend=0)
    scores = np.zeros(orders)
    for ranks in _REFERENCES:
        coarse = chunks.reshape(orders, 2 * ranks, -1).sum(axis=2)
        loads = coarse[:, :ranks] + coarse[:, : ranks - 1 : -1]
        scores += loads.max(axis=1) / loads.mean(axis=1)
    return scores / len(_REFERENCES)
