"""A stage's data as an indexable list: sequence i is a pure function of the config, the seed, the stage and
i.

Positions of a sequence can be read alone, so a rank of a context-parallel group touches only the pages of the
memory map that hold its own tokens. S tokens of a sequence, n positions asked for.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from longctx.config.data import DataConfig
from longctx.data.balance import balanced_order
from longctx.data.index import Corpus, Split
from longctx.data.mixing import rng_of
from longctx.data.plan import Plan
from longctx.data.synth import SynthDocument, make_task
from longctx.data.writer import Writer, corpus_haystack


@dataclass(frozen=True)
class PackedSequence:
    """tokens int32 [S]; boundaries int32 [spans+1], 0 to S, where attention may not cross; weights float32
    [S] of predicting tokens[i] (0 for the first of a document, and for padding); documents: their names, in
    order."""

    tokens: np.ndarray
    boundaries: np.ndarray
    weights: np.ndarray
    documents: tuple[str, ...]


@dataclass(frozen=True)
class LocalSequence:
    """A rank's part of a sequence: at each position the token int32 [n], the next token int64 [n] as its
    label (-100 at the end) and the loss weight float32 [n] of that label; boundaries of the whole sequence.
    """

    tokens: np.ndarray
    labels: np.ndarray
    weights: np.ndarray
    boundaries: np.ndarray


class StageData:
    """Packed sequences of one stage; see longctx.data.opening. Reading is safe from several threads."""

    def __init__(
        self,
        data: DataConfig,
        plan: Plan,
        corpora: Mapping[str, Corpus],
        writer: Writer | None,
        *,
        pad: int,
        seed: int,
        stage: str,
        split: Split,
    ) -> None:
        self.plan = plan
        self.seq_len = plan.seq_len
        self._data = data
        self._corpora = corpora
        self._writer = writer
        self._pad = pad
        self._seed = seed
        self._stage = stage
        self._split: Split = split
        self._made: OrderedDict[tuple[int, int], SynthDocument] = OrderedDict()
        self._orders: OrderedDict[int, tuple[np.ndarray, np.ndarray]] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """Sequences that exist; the plan has exactly as many as were asked for."""
        return len(self.plan)

    def sequence(self, index: int) -> PackedSequence:
        """Sequence `index`, whole. Raises IndexError past the end."""
        everything = np.arange(self.seq_len)
        return PackedSequence(
            self.tokens(index, everything),
            self.boundaries(index),
            self.weights(index, everything),
            self.documents(index),
        )

    def tokens(self, index: int, positions: np.ndarray) -> np.ndarray:
        """int32 [n] tokens at these positions, and nothing else is read."""
        out = np.full(len(positions), self._pad, np.int32)
        for piece, where, at, count in self._overlaps(index, positions):
            out[where : where + count] = self._read(piece, at, count)
        return out

    def weights(self, index: int, positions: np.ndarray) -> np.ndarray:
        """float32 [n] loss weights of predicting the tokens at these positions."""
        out = np.zeros(len(positions), np.float32)
        for piece, where, at, count in self._overlaps(index, positions):
            out[where : where + count] = self._weigh(piece, at, count)
            if at == 0 and (self._data.first_token == "skip" or piece == self._order(index)[0][0]):
                out[where] = 0.0
        return out

    def local(self, index: int, positions: np.ndarray) -> LocalSequence:
        """What the rank that holds these positions needs for a training step: each run of positions is read
        once, with the one token after it."""
        if not len(positions):
            raise ValueError(
                "a rank without positions reads nothing; every rank holds a part of the sequence"
            )
        run = np.concatenate([[0], np.cumsum(np.diff(positions) != 1)])
        place = np.arange(len(positions)) + run
        wider = np.empty(len(positions) + int(run[-1]) + 1, np.int64)
        wider[place] = positions
        ends = np.concatenate([place[:-1][np.diff(run) > 0], place[-1:]])
        wider[ends + 1] = np.minimum(wider[ends] + 1, self.seq_len - 1)
        tokens, weights = self.tokens(index, wider), self.weights(index, wider)[place + 1]
        labels = tokens[place + 1].astype(np.int64)
        last = positions == self.seq_len - 1
        labels[last] = -100
        weights[last] = 0.0
        return LocalSequence(tokens[place], labels, weights, self.boundaries(index))

    def boundaries(self, index: int) -> np.ndarray:
        """int32 [spans+1]; padding is a span of its own."""
        pieces, ends = self._order(index)
        if not self._data.document_mask:
            return np.array([0, self.seq_len], np.int32)
        inner = ends[:-1][~self.plan.glued[pieces[1:]]]
        full = [] if len(ends) and ends[-1] == self.seq_len else ends[-1:].tolist()
        return np.concatenate([[0], inner, full, [self.seq_len]]).astype(np.int32)

    def documents(self, index: int) -> tuple[str, ...]:
        """Names of the pieces in order: source:document, with @start for a piece that begins within it."""
        return tuple(self._name(piece) for piece in self._order(index)[0].tolist())

    def stats(self) -> dict[str, Any]:
        """Padding, epochs and tokens of the stage, for metrics and the report."""
        plan = self.plan
        return {
            "sequences": len(plan),
            "seq_len": plan.seq_len,
            "padding": plan.padding,
            "left_over": plan.left_over,
            "sources": {name: asdict(use) for name, use in plan.use.items()},
        }

    def _order(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """The sequence's pieces, int64, as they stand in it, and where each ends. The order is the evenest
        for zigzag ranks; joined pieces stay as they are. The last few are kept for tokens, weights and
        boundaries."""
        if not 0 <= index < len(self.plan):
            raise IndexError(f"sequence {index} of a stage with {len(self.plan)}")
        with self._lock:
            known = self._orders.get(index)
        if known is not None:
            return known
        pieces = np.arange(self.plan.first[index], self.plan.first[index + 1])
        if self._data.document_mask and not self.plan.glued[pieces].any():
            rng = rng_of(self._seed, self._stage, self._split, "order", index)
            pieces = pieces[balanced_order(self.plan.length[pieces], self.seq_len, rng)]
        made = pieces, np.cumsum(self.plan.length[pieces], dtype=np.int64)
        with self._lock:
            self._orders[index] = made
            while len(self._orders) > 32:
                self._orders.popitem(last=False)
        return made

    def _overlaps(self, index: int, positions: np.ndarray) -> Iterator[tuple[int, int, int, int]]:
        """(piece, place in the output, offset within the piece, count) that together cover the positions."""
        pieces, ends = self._order(index)
        breaks = np.flatnonzero(np.diff(positions) != 1) + 1
        edges = [0, *breaks.tolist(), len(positions)] if len(positions) else []
        for a, b in pairwise(edges):
            low, high = int(positions[a]), int(positions[a]) + b - a
            piece = int(np.searchsorted(ends, low, side="right"))
            while low < high and piece < len(ends):
                start = int(ends[piece - 1]) if piece else 0
                stop = min(high, int(ends[piece]))
                yield int(pieces[piece]), a + low - int(positions[a]), low - start, stop - low
                low, piece = stop, piece + 1

    def _read(self, piece: int, at: int, count: int) -> np.ndarray:
        name = self.plan.names[self.plan.source[piece]]
        if name in self._corpora:
            start = int(self.plan.start[piece]) + at
            return self._corpora[name].read(int(self.plan.document[piece]), start, count)
        return self._synth(piece).tokens[at : at + count]

    def _weigh(self, piece: int, at: int, count: int) -> np.ndarray | float:
        name = self.plan.names[self.plan.source[piece]]
        source = self._data.sources[name]
        if source.kind == "synth":
            return self._synth(piece).weights[at : at + count]
        if source.kind != "chat" or (source.loss == "all" and source.answer_weight is None):
            return 1.0
        corpus, document = self._corpora[name], int(self.plan.document[piece])
        mask = corpus.read_mask(document, int(self.plan.start[piece]) + at, count)
        assert mask is not None, "chat shards hold a mask"
        if source.loss == "assistant":
            return mask.astype(np.float32)
        whole = corpus.read_mask(document, 0, int(corpus.lengths[document]))
        assert whole is not None
        assert source.answer_weight is not None
        spoken = int(whole.sum(dtype=np.int64))
        ratio = source.answer_weight * (len(whole) - spoken) / max(spoken, 1)
        return np.where(mask, np.float32(ratio), np.float32(1.0))

    def _synth(self, piece: int) -> SynthDocument:
        """A virtual document; the last few are kept, since tokens, weights and ranks ask for the same one."""
        source, number = int(self.plan.source[piece]), int(self.plan.document[piece])
        with self._lock:
            made = self._made.get((source, number))
            if made is not None:
                return made
        name = self.plan.names[source]
        config = self._data.sources[name]
        assert self._writer is not None
        assert config.task is not None
        assert config.haystack is not None
        made = make_task(
            config.task,
            int(self.plan.length[piece]),
            rng_of(self._seed, self._stage, name, self._split, number),
            corpus_haystack(self._corpora[config.haystack], self._writer),
            keys="train" if self._split == "train" else "eval",
            tokenizer=self._writer,
        )
        with self._lock:
            self._made[source, number] = made
            while len(self._made) > 8:
                self._made.popitem(last=False)
        return made

    def _name(self, piece: int) -> str:
        name, document = self.plan.names[self.plan.source[piece]], int(self.plan.document[piece])
        start = int(self.plan.start[piece])
        if name in self._corpora:
            return f"{name}:{self._corpora[name].document_name(document)}" + (f"@{start}" if start else "")
        return f"{name}:{self._split}/{self._stage}/{document}"
