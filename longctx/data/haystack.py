"""Tokenize needles and questions, and draw the haystacks in which needles are hidden.

A haystack consists of tokens, so a synthetic document needs only one tokenizer call per needle and question (tens of
microseconds each), whatever its length.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from longctx.data.tokenizer import plain_tokenizer
from longctx.errors import UserError

if TYPE_CHECKING:
    from longctx.data.corpus import Corpus

# (rng, n) -> exactly n tokens, int32
Haystack = Callable[[np.random.Generator, int], np.ndarray]


class NeedleWriter:
    """A fast Hugging Face tokenizer with the tables that writing needles needs; building it reads the vocabulary.

    bos, eos: ids or None. head: the token before a document, int32 [0 or 1]. newline_after: bool [vocabulary], whether
    a token ends a line. ordinary: ids that are neither special nor added. digits: ids of the tokens with the most
    digits 0 to 9. newline: the tokens of a line end.
    """

    def __init__(self, tokenizer: Any, *, bos: bool = True) -> None:
        """bos: whether documents begin with the tokenizer's mark, as data.bos says."""
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise UserError(
                f"the tokenizer {type(tokenizer).__name__} is not a fast tokenizer, so an answer's tokens cannot be "
                "located; load it with AutoTokenizer.from_pretrained(..., use_fast=True)"
            )
        self.tokenizer = tokenizer
        self._backend = plain_tokenizer(backend.to_str())  # a caller may have set padding, too
        self.bos: int | None = tokenizer.bos_token_id
        self.eos: int | None = tokenizer.eos_token_id
        self.head = np.array([self.bos] if bos and self.bos is not None else [], np.int32)
        known = sorted(set(tokenizer.get_vocab().values()))  # with gaps, where a tokenizer has lost tokens
        texts = self._backend.decode_batch([[token] for token in range(known[-1] + 1)])
        self.newline_after = np.array([text.endswith("\n") for text in texts], bool)
        numbers = {token: len(text) for token, text in enumerate(texts) if text.isascii() and text.isdigit()}
        longest = max(numbers.values(), default=0)
        whole = [token for token, length in numbers.items() if length == longest]
        self.digits = np.array(whole, np.int32)
        special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
        self.ordinary = np.array([token for token in known if token not in special], np.int32)
        self.newline = self.tokens("\n")

    def tokens(self, text: str) -> np.ndarray:
        """Tokenize a text without special tokens, int32 [T]."""
        return np.array(self._backend.encode(text, add_special_tokens=False).ids, np.int32)

    def marked(self, before: str, marked: str, after: str = "") -> tuple[np.ndarray, int, int]:
        """Tokenize `before + marked + after`; returns the tokens and the range [start, end) that covers `marked`."""
        encoding = self._backend.encode(before + marked + after, add_special_tokens=False)
        low, high = len(before), len(before) + len(marked)
        inside = [i for i, (a, b) in enumerate(encoding.offsets) if a < high and b > low]
        return np.array(encoding.ids, np.int32), inside[0], inside[-1] + 1


def token_haystack(tokens: np.ndarray, line_end: np.ndarray | None = None) -> Haystack:
    """Make a haystack of random stretches of a token array [T], which continue at its beginning.

    line_end: `NeedleWriter.newline_after`; if given, a stretch begins at a line start when one is near.
    """
    total = len(tokens)
    if total == 0:
        raise UserError("a haystack without tokens hides nothing; give it documents")

    def draw(rng: np.random.Generator, count: int) -> np.ndarray:
        start = int(rng.integers(total))
        if line_end is not None:
            near = np.flatnonzero(line_end[tokens[start : start + 256]])
            start = (start + int(near[0]) + 1) % total if len(near) else start
        first = np.asarray(tokens[start : start + count], np.int32)
        if len(first) == count:
            return first
        return np.concatenate(
            [first, np.resize(np.asarray(tokens[: count - len(first)], np.int32), count - len(first))]
        )

    return draw


def corpus_haystack(corpus: Corpus, writer: NeedleWriter) -> Haystack:
    """Make a haystack of a source's documents: from a random position on, one document after another.

    bos and eos tokens are removed.
    """
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
