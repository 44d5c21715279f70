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
from pathlib import Path
from typing import Any

import numpy as np

from longctx.config.data import DataConfig
from longctx.console import warn
from longctx.data.index import Corpus, Split, check_tally, describe_tally
from longctx.data.mixing import rng_of
from longctx.data.plan import Plan, make_plan
from longctx.data.prepare import build_source
from longctx.data.synth import SynthDocument, make_task
from longctx.data.writer import Writer
from longctx.errors import UserError


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
    """Packed sequences of one stage; see `open_stage`. Reading is safe from several threads."""

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
            if at == 0 and (self._data.first_token == "skip" or piece == self.plan.first[index]):
                out[where] = 0.0
        return out

    def local(self, index: int, positions: np.ndarray) -> LocalSequence:
        """What the rank that holds these positions needs for a training step."""
        following = positions + 1
        last = following == self.seq_len
        following[last] = 0
        labels = self.tokens(index, following).astype(np.int64)
        weights = self.weights(index, following)
        labels[last] = -100
        weights[last] = 0.0
        return LocalSequence(self.tokens(index, positions), labels, weights, self.boundaries(index))

    def boundaries(self, index: int) -> np.ndarray:
        """int32 [spans+1]; padding is a span of its own."""
        first, last = self._range(index)
        if not self._data.document_mask:
            return np.array([0, self.seq_len], np.int32)
        ends = np.cumsum(self.plan.length[first:last])
        own = ~self.plan.glued[first + 1 : last]
        inner = ends[:-1][own]
        full = [] if len(ends) and ends[-1] == self.seq_len else ends[-1:].tolist()
        return np.concatenate([[0], inner, full, [self.seq_len]]).astype(np.int32)

    def documents(self, index: int) -> tuple[str, ...]:
        """Names of the pieces in order: source:document, with @start for a piece that begins within it."""
        first, last = self._range(index)
        return tuple(self._name(piece) for piece in range(first, last))

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

    def _range(self, index: int) -> tuple[int, int]:
        if not 0 <= index < len(self.plan):
            raise IndexError(f"sequence {index} of a stage with {len(self.plan)}")
        return int(self.plan.first[index]), int(self.plan.first[index + 1])

    def _overlaps(self, index: int, positions: np.ndarray) -> Iterator[tuple[int, int, int, int]]:
        """(piece, place in the output, offset within the piece, count) that together cover the positions."""
        first, last = self._range(index)
        ends = np.cumsum(self.plan.length[first:last], dtype=np.int64)
        breaks = np.flatnonzero(np.diff(positions) != 1) + 1
        edges = [0, *breaks.tolist(), len(positions)] if len(positions) else []
        for a, b in pairwise(edges):
            low, high = int(positions[a]), int(positions[a]) + b - a
            piece = int(np.searchsorted(ends, low, side="right"))
            while low < high and piece < len(ends):
                start = int(ends[piece]) - int(self.plan.length[first + piece])
                stop = min(high, int(ends[piece]))
                yield first + piece, a + low - int(positions[a]), low - start, stop - low
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


def corpus_haystack(corpus: Corpus, writer: Writer) -> Any:
    """Straw out of a source's documents: from a random place on, document after document, without the marks
    around them. A function (rng, n) -> int32 [n]."""
    ends = np.cumsum(corpus.lengths, dtype=np.int64)
    marks = [mark for mark in (writer.bos, writer.eos) if mark is not None]

    def draw(rng: np.random.Generator, count: int) -> np.ndarray:
        at = int(rng.integers(ends[-1]))
        document = int(np.searchsorted(ends, at, side="right"))
        start = at - int(ends[document] - corpus.lengths[document])
        parts: list[np.ndarray] = []
        have = 0
        while have < count:
            size = min(int(corpus.lengths[document]) - start, count - have + len(marks) + 256)
            part = corpus.read(document, start, size)
            if not parts:  # begin at a line
                near = np.flatnonzero(writer.newline_after[part[:256]])
                part = part[int(near[0]) + 1 if len(near) else 0 :]
            for mark in marks:
                part = part[part != mark]
            parts.append(part.astype(np.int32))
            have += len(part)
            document, start = (document + 1) % len(ends), 0
        return np.concatenate(parts)[:count]

    return draw


def open_stage(
    data: DataConfig,
    *,
    mix: str,
    seq_len: int,
    sequences: int,
    tokenizer: Any,
    seed: int,
    split: Split,
    cache: Path,
    stage: str,
    vocab_size: int | None = None,
    workers: int | None = None,
    report: Any = None,
) -> StageData:
    """A stage's sequences, tokenizing what is not in `cache` yet.

    sequences: how many the stage needs; sources are repeated where they are shorter, with a warning beyond
    data.max_epochs. split: `heldout` reads the held-out documents and draws synthetic keys of the evaluation
    side. vocab_size: the model's, to refuse a tokenizer that exceeds it. report(source, done, total): bytes.
    Raises UserError for an unknown mix, unusable sources, or a policy that no document can fill.
    """
    chosen = choose_mix(data, mix, stage)
    needed = [name for name, entry in chosen.items() if entry.weight > 0]
    straw = [str(data.sources[name].haystack) for name in needed if data.sources[name].kind == "synth"]
    texts = [name for name in dict.fromkeys([*needed, *straw]) if data.sources[name].kind != "synth"]
    corpora = {
        name: open_source(name, data, tokenizer, cache, split=split, workers=workers, report=report)
        for name in texts
    }
    for name in straw:
        if corpora[name].total <= 256:
            raise UserError(
                f"data.sources.{name} serves as haystack and has {corpora[name].total} tokens in its {split} "
                "documents; give it more documents, or raise data.heldout"
            )
    writer = Writer(tokenizer) if straw else None
    if vocab_size is not None:
        largest = max(
            [corpus.largest_id for corpus in corpora.values()] + ([len(tokenizer) - 1] if straw else [])
        )
        check_vocabulary(largest, vocab_size)
    lengths = {name: corpora[name].lengths for name in texts}
    plan = make_plan(
        data, chosen, lengths, seq_len=seq_len, sequences=sequences, seed=seed, stage=f"{stage}/{split}"
    )
    if split == "train":
        for name, use in plan.use.items():
            if use.epochs > data.max_epochs:
                warn(
                    f"stage {stage} reads source {name} {use.epochs:.1f} times, more than data.max_epochs="
                    f"{data.max_epochs:g}; add documents or lower its weight in data.mixes.{mix}"
                )
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    return StageData(data, plan, corpora, writer, pad=pad, seed=seed, stage=stage, split=split)


def choose_mix(data: DataConfig, mix: str, stage: str) -> Any:
    """The mix a stage names. Raises UserError with the nearest known name."""
    from longctx.errors import nearest

    if mix not in data.mixes:
        near = nearest(mix, data.mixes)
        hint = f"did you mean {near!r}?" if near else f"known: {', '.join(data.mixes)}"
        raise UserError(
            f"curriculum.stages.{stage}.mix={mix} is not one of data.mixes; {hint} (configs/data)"
        )
    return data.mixes[mix]


def open_source(
    name: str,
    data: DataConfig,
    tokenizer: Any,
    cache: Path,
    *,
    split: Split,
    workers: int | None = None,
    report: Any = None,
) -> Corpus:
    """A source's documents of one split, tokenized where they are not yet; says what was skipped."""

    def forward(done: int, total: int) -> None:
        report(name, done, total)

    folders, fresh = build_source(
        name, data, tokenizer, cache, workers=workers, report=forward if report else None
    )
    corpus = Corpus(name, data.sources[name], folders, split=split, heldout=data.heldout)
    everything = sum(shard.meta["documents"] for shard in corpus.shards)
    check_tally(name, corpus.tally, data.max_bad, documents=everything)
    skipped = describe_tally(name, corpus.tally)
    if skipped and fresh:  # said once, not at every start and by every rank
        warn(skipped)
    return corpus


def check_vocabulary(largest: int, vocab_size: int) -> None:
    """Raises UserError when a token id has no row in the model's embedding."""
    if largest >= vocab_size:
        raise UserError(
            f"the tokenizer gives ids up to {largest} and the model has vocab_size={vocab_size}; use the "
            "model's own tokenizer, or resize its embeddings first (model.path)"
        )
