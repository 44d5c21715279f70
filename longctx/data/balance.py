"""Order the documents of a packed sequence so that zigzag ranks get equal attention work.

In the zigzag layout, rank r of R holds chunks r and 2R-1-r of 2R. This balances one causal document, but not several
of different lengths: over 8 ranks at 8,192 tokens, the largest load is 1.25 times the mean for a random order and
1.07 times for the best of eight orders (docs/data.md). `longctx.data` does not know the number of ranks, so an order
is scored for 4 and for 16 ranks together.

P documents, E orders.
"""

from __future__ import annotations

import numpy as np

_ORDERS = 8
_RANK_COUNTS = (4, 16)  # the largest must be a multiple of the others


def balanced_order(lengths: np.ndarray, seq_len: int, rng: np.random.Generator) -> np.ndarray:
    """Return the order with the smallest imbalance among eight candidates, as int64 [P].

    Seven candidates are random. In the eighth, documents get shorter from both ends to the middle, so that documents
    of similar length lie at mirrored positions.
    """
    count = len(lengths)
    if count < 2:
        return np.arange(count)
    orders = np.argsort(rng.random((_ORDERS, count)), axis=1)
    falling = np.argsort(-lengths, kind="stable")
    orders[-1] = np.concatenate([falling[0::2], falling[1::2][::-1]])
    return orders[int(np.argmin(imbalances(lengths[orders], seq_len)))]


def imbalances(lengths: np.ndarray, seq_len: int) -> np.ndarray:
    """Score each order by its largest load divided by its mean load, as float64 [E]; 1 is perfect balance.

    lengths: int [E, P], tokens of the documents in each order. A load is the number of query-key pairs of a rank.
    The score is the mean over _RANK_COUNTS.
    """
    orders = len(lengths)
    finest = 2 * max(_RANK_COUNTS)
    ends = np.cumsum(lengths, axis=1, dtype=np.int64)
    pairs = np.cumsum(lengths * (lengths.astype(np.int64) + 1) // 2, axis=1)
    edges = np.minimum(np.arange(1, finest + 1) * seq_len // finest, ends[0, -1])
    # One search finds the document at each chunk edge for all orders: order e is shifted by e sequences.
    shift = np.arange(orders)[:, None] * np.int64(seq_len + 1)
    document = np.searchsorted((ends + shift).ravel(), (edges + shift).ravel(), side="left")
    into = np.tile(edges, orders) - (ends - lengths).ravel()[document]
    own = lengths.ravel()[document].astype(np.int64)
    before = pairs.ravel()[document] - own * (own + 1) // 2
    done = (before + into * (into + 1) // 2).reshape(orders, finest)
    chunks = np.diff(done, axis=1, prepend=0)
    scores = np.zeros(orders)
    for ranks in _RANK_COUNTS:
        coarse = chunks.reshape(orders, 2 * ranks, -1).sum(axis=2)
        loads = coarse[:, :ranks] + coarse[:, : ranks - 1 : -1]
        scores += loads.max(axis=1) / loads.mean(axis=1)
    return scores / len(_RANK_COUNTS)
