"""Pack documents into sequences of one length: best-fit decreasing, or join and split.

Best-fit decreasing ("Fewer Truncations Improve Language Modeling", 2404.10830) places the longest document first,
each into the fullest bin that still has space for it. All documents of one length are placed together, so numpy packs
ten million in seconds.

P pieces, C tokens in a bin. The space of a bin is the number of tokens that it can still take.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np

_WORD = 12  # bits of a length that one word of the free list covers


class _FreeList:
    """The set of spaces that bins have: finds the smallest space >= n in constant time, by two levels of bits."""

    def __init__(self, capacity: int) -> None:
        self._words = [0] * ((capacity >> _WORD) + 1)
        self._summary = 0

    def add(self, space: int) -> None:
        self._words[space >> _WORD] |= 1 << (space & ((1 << _WORD) - 1))
        self._summary |= 1 << (space >> _WORD)

    def remove(self, space: int) -> None:
        word = space >> _WORD
        self._words[word] &= ~(1 << (space & ((1 << _WORD) - 1)))
        if not self._words[word]:
            self._summary &= ~(1 << word)

    def at_least(self, size: int) -> int | None:
        word = size >> _WORD
        rest = self._words[word] >> (size & ((1 << _WORD) - 1))
        if rest:
            return size + (rest & -rest).bit_length() - 1
        above = self._summary >> (word + 1)
        if not above:
            return None
        word += (above & -above).bit_length()
        bits = self._words[word]
        return (word << _WORD) + (bits & -bits).bit_length() - 1


def best_fit(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, int]:
    """Assign each piece to a bin; returns the bin of each piece, int32 [P], and the number of bins.

    lengths: int [P], each from 1 to C. The result equals best-fit decreasing piece by piece.
    """
    order = np.argsort(-lengths.astype(np.int32), kind="stable").astype(np.int32)
    ordered = lengths[order]
    edges = np.flatnonzero(np.diff(ordered)) + 1
    bounds = [0, *edges.tolist(), len(ordered)] if len(ordered) else []
    bin_of = np.empty(len(lengths), np.int32)
    free = _FreeList(capacity)
    by_space: dict[int, list[np.ndarray]] = {}
    bins = 0
    for first, last in pairwise(bounds):
        size, at = int(ordered[first]), first
        while at < last:
            space = free.at_least(size)
            if space is None:
                fresh = -(-(last - at) // (capacity // size))
                open_bins = np.arange(bins, bins + fresh, dtype=np.int32)
                bins += fresh
                space = capacity
            else:
                open_bins = _take(by_space, free, space)
            at = _fill(open_bins, space, size, at, last, order, bin_of, by_space, free)
    return bin_of, bins


def _take(by_space: dict[int, list[np.ndarray]], free: _FreeList, space: int) -> np.ndarray:
    """Remove and return all bins that have exactly this space."""
    parts = by_space.pop(space)
    free.remove(space)
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _put(by_space: dict[int, list[np.ndarray]], free: _FreeList, space: int, bins: np.ndarray) -> None:
    if space and len(bins):
        if space in by_space:
            by_space[space].append(bins)
        else:
            by_space[space] = [bins]
            free.add(space)


def _fill(
    open_bins: np.ndarray,
    space: int,
    size: int,
    at: int,
    last: int,
    order: np.ndarray,
    bin_of: np.ndarray,
    by_space: dict[int, list[np.ndarray]],
    free: _FreeList,
) -> int:
    """Put the pieces order[at:last], all of length `size`, into `open_bins`; returns the index of the next piece."""
    each = space // size
    count = last - at
    full = min(len(open_bins), count // each)
    rest = min(count - full * each, each) if full < len(open_bins) else 0
    if full:
        bin_of[order[at : at + full * each]] = open_bins[:full] if each == 1 else np.repeat(open_bins[:full], each)
        _put(by_space, free, space - each * size, open_bins[:full])
        at += full * each
    if rest:
        bin_of[order[at : at + rest]] = open_bins[full]
        _put(by_space, free, space - rest * size, open_bins[full : full + 1])
        at += rest
    _put(by_space, free, space, open_bins[full + (1 if rest else 0) :])
    return at


def join_and_split(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Join documents end to end and cut the result every C tokens.

    lengths: int [documents], in the order of joining. Returns document, start within the document, length and bin of
    each piece, int64 each; the last bin may be short.
    """
    ends = np.cumsum(lengths, dtype=np.int64)
    total = int(ends[-1]) if len(ends) else 0
    cuts = np.union1d(np.concatenate([[0], ends[:-1]]), np.arange(0, total, capacity, dtype=np.int64))
    document = np.searchsorted(ends, cuts, side="right")
    start = cuts - (ends[document] - lengths[document])
    length = np.diff(np.concatenate([cuts, [total]]))
    return document, start, length, cuts // capacity
