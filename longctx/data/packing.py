"""Documents into sequences of one length: best-fit decreasing over length classes, or join and split.

Best-fit decreasing ("Fewer Truncations Improve Language Modeling", 2404.10830) places the longest document
first, each into the fullest bin that still takes it. All documents of one length are placed at once, so ten
million take seconds in numpy. P pieces, C tokens a bin holds.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np

_WORD = 12  # bits of a length that one word of the free list covers


class _FreeList:
    """The room left in bins: smallest room >= n in constant time, over two levels of bit words."""

    def __init__(self, capacity: int) -> None:
        self._words = [0] * ((capacity >> _WORD) + 1)
        self._summary = 0

    def add(self, room: int) -> None:
        self._words[room >> _WORD] |= 1 << (room & ((1 << _WORD) - 1))
        self._summary |= 1 << (room >> _WORD)

    def remove(self, room: int) -> None:
        word = room >> _WORD
        self._words[word] &= ~(1 << (room & ((1 << _WORD) - 1)))
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
    """Bin of each piece, int32 [P], and the number of bins.

    lengths: int [P], each 1 to C. Equal to best-fit decreasing document by document.
    """
    order = np.argsort(-lengths.astype(np.int32), kind="stable").astype(np.int32)
    ordered = lengths[order]
    edges = np.flatnonzero(np.diff(ordered)) + 1
    bounds = [0, *edges.tolist(), len(ordered)] if len(ordered) else []
    bin_of = np.empty(len(lengths), np.int32)
    free = _FreeList(capacity)
    rooms: dict[int, list[np.ndarray]] = {}
    bins = 0
    for first, last in pairwise(bounds):
        size, at = int(ordered[first]), first
        while at < last:
            room = free.at_least(size)
            if room is None:
                fresh = -(-(last - at) // (capacity // size))
                stock = np.arange(bins, bins + fresh, dtype=np.int32)
                bins += fresh
                room = capacity
            else:
                stock = _take(rooms, free, room)
            at = _fill(stock, room, size, at, last, order, bin_of, rooms, free)
    return bin_of, bins


def _take(rooms: dict[int, list[np.ndarray]], free: _FreeList, room: int) -> np.ndarray:
    """All bins with exactly this room."""
    parts = rooms.pop(room)
    free.remove(room)
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _put(rooms: dict[int, list[np.ndarray]], free: _FreeList, room: int, bins: np.ndarray) -> None:
    if room and len(bins):
        if room in rooms:
            rooms[room].append(bins)
        else:
            rooms[room] = [bins]
            free.add(room)


def _fill(
    stock: np.ndarray,
    room: int,
    size: int,
    at: int,
    last: int,
    order: np.ndarray,
    bin_of: np.ndarray,
    rooms: dict[int, list[np.ndarray]],
    free: _FreeList,
) -> int:
    """Put pieces order[at:last], all of one size, into the bins of `stock`; returns the first not placed."""
    each = room // size
    count = last - at
    full = min(len(stock), count // each)
    rest = min(count - full * each, each) if full < len(stock) else 0
    if full:
        bin_of[order[at : at + full * each]] = stock[:full] if each == 1 else np.repeat(stock[:full], each)
        _put(rooms, free, room - each * size, stock[:full])
        at += full * each
    if rest:
        bin_of[order[at : at + rest]] = stock[full]
        _put(rooms, free, room - rest * size, stock[full : full + 1])
        at += rest
    _put(rooms, free, room, stock[full + (1 if rest else 0) :])
    return at


def join_and_split(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Pieces of documents laid end to end and cut every C tokens.

    lengths: int [documents] in the order they are joined. Returns (document, start within it, length, bin) of
    each piece, int64; the last bin may be short.
    """
    ends = np.cumsum(lengths, dtype=np.int64)
    total = int(ends[-1]) if len(ends) else 0
    cuts = np.union1d(np.concatenate([[0], ends[:-1]]), np.arange(0, total, capacity, dtype=np.int64))
    document = np.searchsorted(ends, cuts, side="right")
    start = cuts - (ends[document] - lengths[document])
    length = np.diff(np.concatenate([cuts, [total]]))
    return document, start, length, cuts // capacity
