"""The packed sequences of a stage; sequence i is a pure function of the config, the seed, the stage and i.

Single positions of a sequence can be read, so a rank of a context-parallel group touches only the pages of the memory
map that hold its own tokens.

S tokens of a sequence, n positions of a request.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from longctx.config.data import DataConfig, SourceConfig
from longctx.data.balance import balanced_order
from longctx.data.corpus import Corpus, Split
from longctx.data.haystack import NeedleWriter, corpus_haystack
from longctx.data.mixing import rng_of
from longctx.data.stage_packing import StagePacking
from longctx.data.synth import SynthDocument, make_task
from longctx.errors import UserError
from longctx.fingerprint import fingerprint_of


@dataclass(frozen=True)
class PackedSequence:
    """A whole packed sequence.

    tokens: int32 [S]. boundaries: int32 [spans+1], from 0 to S; attention does not cross them. weights: float32 [S],
    the loss weight of predicting tokens[i], 0 for a document's first token and for padding. documents: the names of
    the documents in order.
    """

    tokens: np.ndarray
    boundaries: np.ndarray
    weights: np.ndarray
    documents: tuple[str, ...]


@dataclass(frozen=True)
class LocalSequence:
    """A rank's part of a packed sequence.

    tokens: int32 [n]. labels: int64 [n], the token after each one, -100 at the end of the sequence. weights: float32
    [n], the loss weights of the labels. boundaries: int32 [spans+1], of the whole sequence.
    """

    tokens: np.ndarray
    labels: np.ndarray
    weights: np.ndarray
    boundaries: np.ndarray


@dataclass(frozen=True)
class _SequencePieces:
    """The pieces of one sequence in order, as lists of equal length.

    numbers: indices into the packing. ends: the position after each piece. corpora: None for a synthetic document.
    starts: the offset of each piece within its document. weighted: whether a piece has loss weights other than 1.
    """

    numbers: list[int]
    ends: list[int]
    corpora: list[Corpus | None]
    documents: list[int]
    starts: list[int]
    weighted: list[bool]


class StageData:
    """The packed sequences of one stage, made by `open_stage_data`; several threads may read at once."""

    def __init__(
        self,
        data: DataConfig,
        packing: StagePacking,
        corpora: Mapping[str, Corpus],
        writer: NeedleWriter | None,
        *,
        pad: int,
        seed: int,
        stage: str,
        split: Split,
    ) -> None:
        self.packing = packing
        self.seq_len = packing.seq_len
        self._data = data
        self._corpora = corpora
        self._writer = writer
        self._pad = pad
        self._seed = seed
        self._stage = stage
        self._split: Split = split
        self._made: OrderedDict[tuple[int, int], SynthDocument] = OrderedDict()
        self._recent: OrderedDict[int, _SequencePieces] = OrderedDict()
        self._weighted = {name for name in packing.names if _has_weights(data.sources[name])}
        self._lock = threading.Lock()
        self._stats = _stats(packing)

    def __len__(self) -> int:
        """The number of sequences, which is the number that the stage needs."""
        return len(self.packing)

    def sequence(self, index: int) -> PackedSequence:
        """Return sequence `index` as a whole. Raises IndexError past the end."""
        everything = np.arange(self.seq_len)
        return PackedSequence(
            self.tokens(index, everything),
            self.boundaries(index),
            self.weights(index, everything),
            self.documents(index),
        )

    def tokens(self, index: int, positions: np.ndarray) -> np.ndarray:
        """Read the tokens at these positions, int32 [n]; no other token is read."""
        out = np.full(len(positions), self._pad, np.int32)
        pieces = self._pieces_of(index)
        for slot, where, at, count in _overlaps(pieces.ends, positions):
            corpus = pieces.corpora[slot]
            if corpus is None:
                part = self._synth(pieces.numbers[slot]).tokens[at : at + count]
            else:
                part = corpus.read(pieces.documents[slot], pieces.starts[slot] + at, count)
            out[where : where + count] = part
        return out

    def weights(self, index: int, positions: np.ndarray) -> np.ndarray:
        """Return the loss weights of predicting the tokens at these positions, float32 [n]."""
        pieces = self._pieces_of(index)
        out = np.zeros(len(positions), np.float32)
        plain = not any(pieces.weighted)
        parts = _overlaps(pieces.ends[-1:], positions) if plain else _overlaps(pieces.ends, positions)
        for slot, where, at, count in parts:
            special = not plain and pieces.weighted[slot]
            out[where : where + count] = self._weigh(pieces, slot, at, count) if special else 1.0
        firsts = np.array([0, *pieces.ends[:-1]] if self._data.first_token == "skip" else [0])
        for where, low, high in _runs(positions):
            inside = firsts[np.searchsorted(firsts, low) : np.searchsorted(firsts, high)]
            out[inside + (where - low)] = 0.0
        return out

    def local(self, index: int, positions: np.ndarray) -> LocalSequence:
        """Read what a rank with these positions needs for a training step.

        Each run of consecutive positions is read once, together with the token after it. Raises ValueError when
        there are no positions.
        """
        if not len(positions):
            raise ValueError("a rank without positions has nothing to train on")
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
        """Return the boundaries that attention does not cross, int32 [spans+1]; padding is a span of its own."""
        pieces = self._pieces_of(index)
        if not self._data.document_mask:
            return np.array([0, self.seq_len], np.int32)
        ends = np.array(pieces.ends)
        inner = ends[:-1][~self.packing.joined[pieces.numbers[1:]]]
        full = ends[-1:] if ends[-1] < self.seq_len else []
        return np.concatenate([[0], inner, full, [self.seq_len]]).astype(np.int32)

    def documents(self, index: int) -> tuple[str, ...]:
        """Return the names of the pieces in order: source:document, and @start if the piece begins within it."""
        return tuple(self._name(piece) for piece in self._pieces_of(index).numbers)

    def stats(self) -> dict[str, Any]:
        """Return figures of the packing of the whole stage, whatever part of it has been trained or resumed.

        padding: the share of positions without a token. cut: the share of documents that are split at least once.
        epochs: by source, see DrawnPieces. left_over: see StagePacking. sources: a SourceUse for each source.
        """
        return self._stats

    @property
    def contents(self) -> dict[str, str]:
        """Fingerprints of the documents and tokens of each source that has files."""
        return {name: corpus.key for name, corpus in self._corpora.items()}

    @property
    def plan(self) -> str:
        """A fingerprint of which documents form which sequence; with another one a cursor points into others."""
        return fingerprint_of({"packing": self.packing.fingerprint(), **self.contents})

    def check_tasks(self) -> None:
        """Make the shortest document of each synth source. Raises UserError when its task needs more tokens."""
        for number, name in enumerate(self.packing.names):
            mine = np.flatnonzero(self.packing.source == number)
            if self._data.sources[name].kind == "synth" and len(mine):
                self._synth(int(mine[np.argmin(self.packing.length[mine])]))

    def check_labels(self) -> None:
        """Raise UserError when no token of the whole stage has a loss weight, so that training would do nothing."""
        everything = np.arange(self.seq_len)
        if any(self.weights(index, everything).any() for index in range(len(self))):
            return
        reasons = "; ".join(self._why_no_loss(name) for name, use in self.packing.use.items() if use.tokens)
        raise UserError(
            f"curriculum.stages.{self._stage}: no token of its {len(self)} sequences carries loss, so it would train "
            f"nothing: {reasons} (configs/data)"
        )

    def _why_no_loss(self, name: str) -> str:
        """Say why no token of a source has a loss weight, and what to do about it."""
        where = f"data.sources.{name}"
        if self._data.sources[name].loss == "assistant":
            return (
                f"{where}.loss=assistant trains on the assistant's turns alone, and no message of its conversations "
                "has the role 'assistant' and text; name the role so in the data, or set loss=all"
            )
        return f"{where} has documents of one token only, and the first token of a document is never predicted"

    def _pieces_of(self, index: int) -> _SequencePieces:
        """Return the pieces of a sequence in their final order.

        Pieces are ordered for even work on zigzag ranks; sequences with joined pieces keep their order. The last few
        results are cached, because tokens, weights and boundaries of a sequence are read one after the other.
        """
        if not 0 <= index < len(self.packing):
            raise IndexError(f"sequence {index} of a stage with {len(self.packing)}")
        with self._lock:
            known = self._recent.get(index)
        if known is not None:
            return known
        packing = self.packing
        pieces = np.arange(packing.first[index], packing.first[index + 1])
        if self._data.document_mask and not packing.joined[pieces].any():
            rng = rng_of(self._seed, self._stage, self._split, "order", index)
            pieces = pieces[balanced_order(packing.length[pieces], self.seq_len, rng)]
        names = [packing.names[number] for number in packing.source[pieces].tolist()]
        made = _SequencePieces(
            pieces.tolist(),
            np.cumsum(packing.length[pieces], dtype=np.int64).tolist(),
            [self._corpora.get(name) for name in names],
            packing.document[pieces].tolist(),
            packing.start[pieces].tolist(),
            [name in self._weighted for name in names],
        )
        with self._lock:
            self._recent[index] = made
            while len(self._recent) > 32:
                self._recent.popitem(last=False)
        return made

    def _weigh(self, pieces: _SequencePieces, slot: int, at: int, count: int) -> np.ndarray:
        """Return the loss weights of a part of a synthetic document or of a conversation, float32 [count]."""
        corpus, document = pieces.corpora[slot], pieces.documents[slot]
        if corpus is None:
            return self._synth(pieces.numbers[slot]).weights[at : at + count]
        mask = corpus.read_mask(document, pieces.starts[slot] + at, count)
        assert mask is not None, "chat shards hold a mask"
        if corpus.source.loss == "assistant":
            return mask.astype(np.float32)
        whole = corpus.read_mask(document, 0, int(corpus.lengths[document]))
        assert whole is not None
        assert corpus.source.answer_weight is not None
        spoken = int(whole.sum(dtype=np.int64))
        ratio = corpus.source.answer_weight * (len(whole) - spoken) / max(spoken, 1)
        return np.where(mask, np.float32(ratio), np.float32(1.0))

    def _synth(self, piece: int) -> SynthDocument:
        """Make the synthetic document of a piece; the last few are cached, because several calls read the same one."""
        source, number = int(self.packing.source[piece]), int(self.packing.document[piece])
        with self._lock:
            made = self._made.get((source, number))
            if made is not None:
                return made
        name = self.packing.names[source]
        config = self._data.sources[name]
        assert self._writer is not None
        assert config.task is not None
        assert config.haystack is not None
        made = make_task(
            config.task,
            int(self.packing.length[piece]),
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
        name, document = self.packing.names[self.packing.source[piece]], int(self.packing.document[piece])
        start = int(self.packing.start[piece])
        if name in self._corpora:
            return f"{name}:{self._corpora[name].document_name(document)}" + (f"@{start}" if start else "")
        return f"{name}:{self._split}/{self._stage}/{document}"


def _stats(packing: StagePacking) -> dict[str, Any]:
    documents = sum(use.documents for use in packing.use.values())
    return {
        "sequences": len(packing),
        "seq_len": packing.seq_len,
        "padding": packing.padding,
        "cut": sum(use.cut for use in packing.use.values()) / max(documents, 1),
        "epochs": {name: use.epochs for name, use in packing.use.items()},
        "left_over": packing.left_over,
        "sources": {name: asdict(use) for name, use in packing.use.items()},
    }


def _has_weights(source: SourceConfig) -> bool:
    return source.kind == "synth" or source.loss == "assistant" or source.answer_weight is not None


def _overlaps(ends: list[int], positions: np.ndarray) -> Iterator[tuple[int, int, int, int]]:
    """Divide the positions by pieces; yields (piece, index into the output, offset within the piece, count).

    Piece i covers the positions from ends[i-1] (0 for the first) to ends[i].
    """
    for where, low, high in _runs(positions):
        shift = where - low
        slot = bisect_right(ends, low)
        while low < high and slot < len(ends):
            start = ends[slot - 1] if slot else 0
            stop = min(high, ends[slot])
            yield slot, low + shift, low - start, stop - low
            low, slot = stop, slot + 1


def _runs(positions: np.ndarray) -> Iterator[tuple[int, int, int]]:
    """Yield (index into the output, first position, last position + 1) of each run of consecutive positions."""
    breaks = np.flatnonzero(np.diff(positions) != 1) + 1
    edges = [0, *breaks.tolist(), len(positions)] if len(positions) else []
    for a, b in pairwise(edges):
        low = int(positions[a])
        yield a, low, low + b - a
