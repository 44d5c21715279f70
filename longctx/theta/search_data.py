"""The sequences on which a search judges a theta: long held-out documents, and needle prompts.

The needles use keys that are reserved for evaluation. Documents shorter than a sequence are joined with the next ones;
a line on the screen says how many were long enough.

S tokens of a sequence of the stage.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from longctx.config.data import DataConfig
from longctx.config.eval import NeedleConfig
from longctx.config.theta import SearchConfig
from longctx.console import say
from longctx.data.check import sources_of
from longctx.data.haystack import NeedleWriter, corpus_haystack
from longctx.data.stage_opening import open_source
from longctx.errors import UserError


@dataclass(frozen=True)
class WeightedSequence:
    """One sequence: tokens int64 [S], and the loss weight of predicting each one, float32 [S]."""

    tokens: np.ndarray
    weights: np.ndarray


@dataclass(frozen=True)
class SearchData:
    """The sequences of a search: texts with weight on the last quarter, needle prompts with weight on the answers."""

    texts: list[WeightedSequence]
    needles: list[WeightedSequence]


def load_search_data(
    data: DataConfig, mix: str, tokenizer: Any, *, length: int, trials: SearchConfig, cache: Path
) -> SearchData:
    """Load held-out texts and needle prompts of `length` tokens, the same for every theta.

    They come from the mix's largest text source, or from the largest of all mixes when the mix is unknown. Raises
    UserError when there is no text source or it holds out too little text.
    """
    mixes = [data.mixes[mix]] if mix in data.mixes else data.mixes.values()
    texts = [name for name in sources_of(data, mixes) if data.sources[name].kind != "chat"]
    if not texts:
        raise UserError(
            f"data.mixes.{mix} holds no text, and a search needs long held-out documents; choose data=stdlib or "
            "data=text data.path=FOLDER"
        )
    corpora = [open_source(name, data, tokenizer, cache, split="heldout") for name in texts]
    corpus = max(corpora, key=lambda corpus: corpus.total)
    rows = long_documents(corpus, length, trials.documents, np.random.default_rng(trials.seed))
    last_quarter = (np.arange(length) >= length * 3 // 4).astype(np.float32)
    needles = _needles(NeedleWriter(tokenizer, bos=data.bos), corpus, length, trials) if trials.needles else []
    return SearchData([WeightedSequence(row, last_quarter) for row in rows], needles)


def long_documents(corpus: Any, length: int, count: int, rng: np.random.Generator) -> np.ndarray:
    """Return beginnings of long documents, then short ones joined to that length, as int64 [count, length].

    Where all are long, their further parts come second.
    """
    if corpus.total < 2 * length:
        raise UserError(
            f"data.sources.{corpus.name} holds out {corpus.total} tokens, too few for documents of {length}: at least "
            f"{2 * length} are needed; raise data.heldout, or search at a shorter length"
        )
    order = rng.permutation(len(corpus))
    long = [int(d) for d in order if corpus.lengths[d] >= length][:count]
    rows = [np.asarray(corpus.read(d, 0, length), np.int64) for d in long]
    short = [int(d) for d in order if corpus.lengths[d] < length]
    if len(rows) < count:
        others = "joined" if short else "further parts of these"
        say(f"{len(rows)} held-out documents of {corpus.name} have {length} tokens; the others are {others}")
    if not short:  # no sequence is read twice while there is other text
        parts = [(d, at) for d in long for at in range(length, int(corpus.lengths[d]) - length + 1, length)]
        rows += [np.asarray(corpus.read(d, at, length), np.int64) for d, at in parts[: count - len(rows)]]
    at = 0
    while len(rows) < count:
        pieces, have = [], 0
        while have < length:
            document = short[at % len(short)] if short else long[at % len(long)]
            part = np.asarray(corpus.read(document, 0, int(corpus.lengths[document])), np.int64)
            pieces.append(part)
            have += len(part)
            at += 1
        rows.append(np.concatenate(pieces)[:length])
    return np.stack(rows)


def _needles(writer: NeedleWriter, corpus: Any, length: int, trials: SearchConfig) -> list[WeightedSequence]:
    from longctx.eval.needle import prompts

    config = NeedleConfig(lengths=(length,), per_cell=trials.needles, seeds=(trials.seed,))
    found = []
    for prompt in prompts(config, writer, corpus_haystack(corpus, writer)):
        weights = np.zeros(len(prompt.document.tokens), np.float32)
        for answer in prompt.document.answers:
            weights[answer.start : answer.end] = 1.0
        found.append(WeightedSequence(prompt.document.tokens.astype(np.int64), weights))
    return found
