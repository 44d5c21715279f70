"""Which token of a sequence lies on which rank, and which rectangles of attention a pair of ranks shares.

This module is index arithmetic only. Every layout reduces to *pieces*: runs of consecutive tokens of one document, in
ascending order on each rank. No mask is ever built, for two reasons. A rank's tokens of one document ascend, so the
rank's own block is one causal call per document. A query piece sees a prefix of another rank's tokens of the same
document, so an off-diagonal pair of ranks shares a few plain rectangles or nothing. The zigzag layout follows
zhuzilin/ring-flash-attention (compare Striped Attention, 2311.09431). The documents layout cuts each long document
into 2R pieces.

    S tokens of the sequence, N ranks = R ring positions x h Ulysses ranks
    L tokens of a position, n = L / h tokens of a rank
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np

LayoutKind = Literal["contiguous", "zigzag", "documents"]
LAYOUT_KINDS: tuple[LayoutKind, ...] = ("contiguous", "zigzag", "documents")


class Rect(NamedTuple):
    """Queries [q0, q1) attend to keys [k0, k1): to all of them, or causally between two runs of equal length."""

    q0: int
    q1: int
    k0: int
    k1: int
    causal: bool

    @property
    def pairs(self) -> int:
        """Query-key pairs that the rectangle computes."""
        n = self.q1 - self.q0
        return n * (n + 1) // 2 if self.causal else n * (self.k1 - self.k0)


class Copy(NamedTuple):
    """Copies `length` tokens of the `block`-th block from `source` to `target`, a place in the ascending order."""

    block: int
    source: int
    target: int
    length: int


@dataclass(frozen=True, eq=False)
class DocumentPieces:
    """The pieces of one ring position in ascending order.

    doc: each piece's document. start, end: its tokens in the sequence. local: its first token on the position.
    """

    doc: np.ndarray
    start: np.ndarray
    end: np.ndarray
    local: np.ndarray

    @cached_property
    def edges(self) -> tuple[np.ndarray, np.ndarray]:
        """The first and the last piece of each document here; the pieces of a document are adjacent."""
        change = np.flatnonzero(self.doc[1:] != self.doc[:-1]) + 1
        if not len(self.doc):
            return change, change
        return np.r_[0, change], np.r_[change, len(self.doc)] - 1

    def runs(self) -> list[tuple[int, int]]:
        """The local tokens [first, past) of each document on this position."""
        first, last = self.edges
        ends = self.local[last] + self.end[last] - self.start[last]
        return list(zip(self.local[first].tolist(), ends.tolist(), strict=True))


class SequenceLayout:
    """Distributes a sequence of `seq_len` tokens over `positions` ring positions of `ulysses` ranks each.

    `boundaries` are cu_seqlens [0, ..., seq_len] (None: one document). The layout pads the sequence to `padded_len`
    tokens; padding belongs to no document and has index -1. Raises ValueError, which names the argument, for lengths
    below 2N and for boundaries that do not ascend to seq_len.
    """

    def __init__(
        self,
        seq_len: int,
        positions: int,
        *,
        kind: LayoutKind = "zigzag",
        boundaries: np.ndarray | None = None,
        ulysses: int = 1,
    ) -> None:
        if kind not in LAYOUT_KINDS:
            raise ValueError(f"kind={kind!r} is not one of {', '.join(LAYOUT_KINDS)}")
        if seq_len < 2 * (size := positions * ulysses):
            raise ValueError(f"seq_len={seq_len} is shorter than 2N = {2 * size} for N = {size} ranks")
        self.seq_len, self.count, self.ulysses = seq_len, positions, ulysses
        self.kind: LayoutKind = kind
        self.boundaries = check_boundaries(boundaries, seq_len)
        self.position_len = _position_len(seq_len, positions, ulysses, kind)
        self.rank_len = self.position_len // ulysses
        self.padded_len = self.position_len * positions
        self._rects: dict[tuple, list[Rect]] = {}
        self._orders: dict[tuple[int, ...], tuple[DocumentPieces, list[Copy]]] = {}

    @property
    def padding(self) -> int:
        return self.padded_len - self.seq_len

    @cached_property
    def segments(self) -> list[np.ndarray]:
        """The runs [k, 2] of (start, length) that each position holds, in ascending order and without padding."""
        if self.kind == "documents":
            return _document_segments(self.boundaries, self.count, self.position_len)
        return _chunk_segments(self.seq_len, self.count, self.position_len, self.kind)

    @cached_property
    def pieces(self) -> list[DocumentPieces]:
        return [_cut(segments, self.boundaries) for segments in self.segments]

    def indices(self, rank: int) -> np.ndarray:
        """The index in the sequence of each token of `rank`, -1 for padding; int64 [n]."""
        position, u = divmod(rank, self.ulysses)
        whole = np.full(self.position_len, -1, np.int64)
        at = 0
        for start, length in self.segments[position]:
            whole[at : at + length] = np.arange(start, start + length)
            at += length
        return whole[u * self.rank_len : (u + 1) * self.rank_len]

    def positions(self, rank: int, *, restart: bool = False) -> np.ndarray:
        """RoPE positions, counted through the sequence or from each document's start; int64 [n], 0 for padding."""
        indices = self.indices(rank)
        real = np.maximum(indices, 0)
        if restart:
            real = real - self.boundaries[np.searchsorted(self.boundaries, real, side="right") - 1]
        return np.where(indices < 0, 0, real)

    def local_boundaries(self, rank: int) -> np.ndarray:
        """cu_seqlens of the documents among `rank`'s own tokens, int64 [d + 1]; padding comes after the last."""
        indices = self.indices(rank)
        real = indices[indices >= 0]
        doc = np.searchsorted(self.boundaries, real, side="right")
        return np.r_[np.flatnonzero(np.r_[True, doc[1:] != doc[:-1]]) if len(doc) else [], len(real)].astype(np.int64)

    @cached_property
    def work(self) -> np.ndarray:
        """Whether queries of position i attend to keys of position j; bool [R, R]."""
        meets = np.eye(self.count, dtype=bool)
        places: dict[int, list[tuple[int, int, int]]] = {}
        for position, pieces in enumerate(self.pieces):
            first, last = pieces.edges
            columns = (pieces.doc[first], pieces.start[first], pieces.end[last])
            for doc, start, end in zip(*(c.tolist() for c in columns), strict=True):
                places.setdefault(doc, []).append((position, start, end))
        for spans in places.values():
            if len(spans) > 1:
                at, first, past = np.array(spans).T
                meets[np.ix_(at, at)] |= past[:, None] - 1 > first[None, :]
        return meets

    def rects(self, position: int, blocks: tuple[int, ...], part: tuple[int, int] = (0, 1)) -> list[Rect]:
        """The rectangles between the queries of `position` and the keys of `blocks`, which lie in `ascending_order`.

        `blocks == (position,)` is the diagonal: one causal rectangle per document. Only the diagonal is divided:
        `part` (i, n) takes the i-th of n shares, of which the last has about half of the work.
        """
        key = (position, blocks, part)
        if key not in self._rects:
            diagonal = blocks == (position,)
            self._rects[key] = self._diagonal(position, part) if diagonal else self._off(position, blocks)
        return self._rects[key]

    def _diagonal(self, position: int, part: tuple[int, int]) -> list[Rect]:
        whole = [Rect(a, b, a, b, True) for a, b in self.pieces[position].runs()]
        return whole if part[1] == 1 else _shares(whole, part[1])[part[0]]

    def _off(self, position: int, blocks: tuple[int, ...]) -> list[Rect]:
        mine, theirs = self.pieces[position], self._gathered(blocks)[0]
        rects: list[Rect] = []
        for doc, start, end, at in zip(mine.doc, mine.start, mine.end, mine.local, strict=True):
            first = int(np.searchsorted(theirs.doc, doc, side="left"))
            past = int(np.searchsorted(theirs.doc, doc, side="right"))
            seen = first + int(np.searchsorted(theirs.start[first:past], start, side="left"))
            if seen == first:
                continue
            k0 = int(theirs.local[first])
            k1 = int(theirs.local[seen - 1] + theirs.end[seen - 1] - theirs.start[seen - 1])
            q0, q1 = int(at), int(at + end - start)
            if rects and rects[-1].q1 == q0 and (rects[-1].k0, rects[-1].k1) == (k0, k1):
                q0 = rects.pop().q0
            rects.append(Rect(q0, q1, k0, k1, False))
        return rects

    def ascending_order(self, blocks: tuple[int, ...]) -> list[Copy]:
        """The copies that bring the tokens of several blocks into ascending order."""
        return self._gathered(blocks)[1]

    def _gathered(self, blocks: tuple[int, ...]) -> tuple[DocumentPieces, list[Copy]]:
        if blocks not in self._orders:
            self._orders[blocks] = self._order(blocks)
        return self._orders[blocks]

    def _order(self, blocks: tuple[int, ...]) -> tuple[DocumentPieces, list[Copy]]:
        if len(blocks) == 1:
            return self.pieces[blocks[0]], [Copy(0, 0, 0, self.position_len)]
        parts = [self.pieces[b] for b in blocks]
        number = np.concatenate([np.full(len(p.doc), i) for i, p in enumerate(parts)])
        doc, start, end, local = (
            np.concatenate([getattr(p, f) for p in parts]) for f in ("doc", "start", "end", "local")
        )
        order = np.argsort(start, kind="stable")
        number, doc, start, end, local = number[order], doc[order], start[order], end[order], local[order]
        length = end - start
        target = np.cumsum(length) - length
        copies: list[Copy] = []
        for b, s, t, n in zip(number.tolist(), local.tolist(), target.tolist(), length.tolist(), strict=True):
            if copies and copies[-1].block == b and copies[-1].source + copies[-1].length == s:
                last = copies.pop()
                s, t, n = last.source, last.target, last.length + n
            copies.append(Copy(b, s, t, n))
        return DocumentPieces(doc, start, end, target), copies

    def loads(self) -> np.ndarray:
        """Query-key pairs of each ring position; int64 [R]."""
        return np.array([_pairs(p, self.boundaries) for p in self.pieces])

    def imbalance(self) -> float:
        """The largest number of query-key pairs of a position, divided by the mean; 1.0 is perfect balance."""
        loads = self.loads()
        return float(loads.max() / loads.mean())


def check_boundaries(boundaries: np.ndarray | None, seq_len: int) -> np.ndarray:
    """cu_seqlens as int64 [documents + 1]; raises ValueError unless they ascend strictly from 0 to seq_len."""
    if boundaries is None:
        return np.array([0, seq_len], np.int64)
    array = np.asarray(boundaries)
    if array.ndim != 1 or len(array) < 2 or not np.issubdtype(array.dtype, np.integer):
        raise ValueError(
            f"documents has shape {array.shape} and type {array.dtype}: boundaries are integers [0, ..., {seq_len}], "
            "the cu_seqlens of the whole sequence (a dense mask is never needed)"
        )
    array = array.astype(np.int64)
    if array[0] != 0 or array[-1] != seq_len:
        raise ValueError(
            f"documents runs from {array[0]} to {array[-1]}: it must begin at 0 and end at seq_len={seq_len}"
        )
    if (steps := np.diff(array)).min() <= 0:
        at = int(np.argmin(steps > 0))
        raise ValueError(
            f"documents[{at}:{at + 2}]={array[at : at + 2].tolist()}: boundaries must be strictly increasing"
        )
    return array


def _position_len(seq_len: int, positions: int, ulysses: int, kind: LayoutKind) -> int:
    """Tokens of a position: a multiple of the Ulysses ranks, and of 2 in zigzag (two equal chunks)."""
    multiple = math.lcm(2, ulysses) if kind == "zigzag" else ulysses
    return -(-seq_len // (positions * multiple)) * multiple


def _chunk_segments(seq_len: int, positions: int, length: int, kind: LayoutKind) -> list[np.ndarray]:
    chunk = length // 2 if kind == "zigzag" else length
    result = []
    for r in range(positions):
        starts = np.array([r, 2 * positions - 1 - r] if kind == "zigzag" else [r]) * chunk
        ends = np.minimum(starts + chunk, seq_len)
        kept = ends > starts
        result.append(np.stack([starts, ends - starts], 1)[kept])
    return result


def _cut(segments: np.ndarray, boundaries: np.ndarray) -> DocumentPieces:
    """Cut segments at the document boundaries inside them."""
    starts, ends = [], []
    for start, length in segments:
        inside = boundaries[np.searchsorted(boundaries, start, "right") : np.searchsorted(boundaries, start + length)]
        edges = np.r_[start, inside, start + length]
        starts.append(edges[:-1])
        ends.append(edges[1:])
    start = np.concatenate(starts) if starts else np.zeros(0, np.int64)
    end = np.concatenate(ends) if ends else np.zeros(0, np.int64)
    doc = np.searchsorted(boundaries, start, side="right") - 1
    return DocumentPieces(doc, start, end, np.cumsum(end - start) - (end - start))


def _pairs(pieces: DocumentPieces, boundaries: np.ndarray) -> int:
    """Query-key pairs of the pieces: the sum over their tokens t of (t - document start + 1)."""
    first = pieces.start - boundaries[pieces.doc] + 1
    n = pieces.end - pieces.start
    return int((n * first + n * (n - 1) // 2).sum())


def _document_segments(boundaries: np.ndarray, positions: int, length: int) -> list[np.ndarray]:
    """Cut only as many documents as balance needs.

    Documents at or above a threshold are cut into 2R pieces each, and the others fill the positions in order. The
    highest threshold that balances the positions to 5 % is taken, or else the one that balances best.
    """
    lengths = np.diff(boundaries)
    seen, best, best_load = set(), None, math.inf
    for threshold in [int(boundaries[-1]) + 1] + [int(boundaries[-1]) >> k for k in range(24)]:
        if threshold < 4 * positions:
            break
        cut = lengths >= threshold
        if int(cut.sum()) in seen:
            continue
        seen.add(int(cut.sum()))
        segments = _place(boundaries, cut, positions, length)
        loads = np.array([_pairs(_cut(s, boundaries), boundaries) for s in segments])
        load = loads.max() / loads.mean()
        if load < best_load:
            best, best_load = segments, load
        if load <= 1.05:
            break
    return best if best is not None else _place(boundaries, lengths < 0, positions, length)


def _place(boundaries: np.ndarray, cut: np.ndarray, positions: int, length: int) -> list[np.ndarray]:
    """Give pieces r and 2R-1-r of each cut document to position r, then fill the positions with the other documents.

    Tokens that 2R does not divide go round robin, so the positions differ by at most one token before the uncut
    documents fill each of them up to `length`.
    """
    placed: list[list[tuple[int, int]]] = [[] for _ in range(positions)]
    turn = 0
    for d in np.flatnonzero(cut):
        start, size = int(boundaries[d]), int(boundaries[d + 1] - boundaries[d])
        each, extra = divmod(size, 2 * positions)
        sizes = [each] * (2 * positions)
        for k in range(extra):
            r = (turn + k) % positions
            sizes[r if sizes[r] == each else 2 * positions - 1 - r] += 1
        turn = (turn + extra) % positions
        for piece, n in enumerate(sizes):
            if n:
                placed[min(piece, 2 * positions - 1 - piece)].append((start, n))
            start += n
    room = [length - sum(n for _, n in p) for p in placed]
    r = 0
    for d in np.flatnonzero(~cut):
        start, end = int(boundaries[d]), int(boundaries[d + 1])
        while start < end:
            while room[r] == 0:
                r += 1
            n = min(room[r], end - start)
            placed[r].append((start, n))
            room[r] -= n
            start += n
    return [_joined(sorted(p)) for p in placed]


def _joined(runs: list[tuple[int, int]]) -> np.ndarray:
    joined: list[list[int]] = []
    for start, n in runs:
        if joined and joined[-1][0] + joined[-1][1] == start:
            joined[-1][1] += n
        else:
            joined.append([start, n])
    return np.array(joined, np.int64).reshape(-1, 2)


def _shares(rects: list[Rect], count: int) -> list[list[Rect]]:
    """Divide the diagonal's rectangles into `count` shares: the last gets half of the work, the others the rest.

    A document with more than a quarter of the work is cut into two causal halves and the square below them.
    """
    total = sum(r.pairs for r in rects)
    units: list[Rect] = []
    for r in rects:
        if r.pairs * 4 > total and r.q1 - r.q0 > 1:
            half = (r.q0 + r.q1) // 2
            units += [Rect(r.q0, half, r.q0, half, True), Rect(half, r.q1, half, r.q1, True)]
            units.append(Rect(half, r.q1, r.q0, half, False))
        else:
            units.append(r)
    wanted = [total / 2 / (count - 1)] * (count - 1) + [total / 2]
    shares: list[list[Rect]] = [[] for _ in range(count)]
    for unit in sorted(units, key=lambda r: -r.pairs):
        k = max(range(count), key=lambda i: wanted[i])
        shares[k].append(unit)
        wanted[k] -= unit.pairs
    return shares
