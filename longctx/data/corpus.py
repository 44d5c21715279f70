"""A source's tokenized documents as one indexed list: lengths are in memory, tokens stay in memory-mapped shards.

This module divides the documents into training and held-out and applies min_len and max_len; changing these
settings needs no new tokenization.

D documents of one split.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from longctx.config.data import SourceConfig
from longctx.data.documents import Tally
from longctx.data.shard import Shard
from longctx.errors import UserError
from longctx.fingerprint import fingerprint_of

Split = Literal["train", "heldout"]
Whole = Literal["all"]


class Corpus:
    """The documents of a source that belong to one split, or all of them.

    lengths: int32 [D], tokens of each document. held_lengths: int32, tokens of each held-out document of the source.
    tally: counts of the records read, over both splits. Raises UserError when min_len and max_len leave out every
    document.
    """

    def __init__(
        self, name: str, source: SourceConfig, folders: Sequence[Path], *, split: Split | Whole, heldout: float
    ) -> None:
        self.name = name
        self.source = source
        self.shards = [Shard(folder) for folder in folders]
        self.tally = Tally()
        for shard in self.shards:
            self.tally.add(Tally.of(shard.meta["tally"]))
        lengths = np.concatenate([np.diff(shard.starts) for shard in self.shards]).astype(np.int32)
        buckets = np.concatenate([shard.buckets for shard in self.shards])
        keep = lengths >= source.min_len
        if source.max_len is not None:
            keep &= lengths <= source.max_len
        if len(keep) and not keep.any():
            raise UserError(
                f"data.sources.{name}: all {len(keep):,} documents are left out: they have {lengths.min():,} to "
                f"{lengths.max():,} tokens, and min_len={source.min_len:,}"
                + ("" if source.max_len is None else f" with max_len={source.max_len:,}")
                + " keeps none of them (configs/data)"
            )
        held = held_out(buckets, heldout)
        self.held_lengths: np.ndarray = lengths[keep & held]
        if split != "all":
            keep &= held == (split == "heldout")
        chosen = np.flatnonzero(keep)
        counts = np.array([len(shard.buckets) for shard in self.shards])
        firsts = np.concatenate([[0], np.cumsum(counts)])
        self.lengths: np.ndarray = lengths[chosen]
        self._shard = (np.searchsorted(firsts, chosen, side="right") - 1).astype(np.int32)
        self._within = (chosen - firsts[self._shard]).astype(np.int32)
        starts = np.concatenate([shard.starts[:-1] for shard in self.shards])
        self._address = starts[chosen]

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def total(self) -> int:
        """The number of tokens of all documents of this split."""
        return int(self.lengths.sum(dtype=np.int64))

    @property
    def key(self) -> str:
        """A fingerprint of the shards; a shard's name is a hash of its documents' content and the tokenizer."""
        return fingerprint_of({"shards": [shard.folder.name for shard in self.shards]})

    @property
    def largest_id(self) -> int:
        return max(shard.meta["largest_id"] for shard in self.shards)

    def hold_out_more(self, share: float) -> str:
        """What to do for more held-out documents than `share` (data.heldout) gives, as the end of a sentence.

        Documents of one group, such as a file's parts, are held out together, and one group is left to train on.
        """
        buckets = np.concatenate([shard.buckets for shard in self.shards])
        if len(np.unique(buckets)) < 2:
            what = "1 document" if len(buckets) == 1 else f"{len(buckets):,} documents of one group"
            return f"it has {what} in all, and 2 are needed, one to train on and one to hold out; add documents"
        if share > 0 and not held_out(buckets, share).any():
            return f"data.heldout={share:g} would hold out all {len(buckets):,} documents, so none is; lower it"
        return f"raise data.heldout={share:g}, or add documents"

    def document_name(self, document: int) -> str:
        return self.shards[self._shard[document]].name(int(self._within[document]))

    def read(self, document: int, start: int, count: int) -> np.ndarray:
        """Return tokens [start, start + count) of a document as a view into the memory map, uint16 or uint32."""
        at = int(self._address[document]) + start
        return self.shards[self._shard[document]].tokens[at : at + count]

    def read_mask(self, document: int, start: int, count: int) -> np.ndarray | None:
        """Return the mask of the same tokens, uint8, 1 for an assistant token; None for a text source."""
        mask = self.shards[self._shard[document]].mask
        at = int(self._address[document]) + start
        return None if mask is None else mask[at : at + count]


def held_out(buckets: np.ndarray, share: float) -> np.ndarray:
    """Return bool [D]: the documents whose bucket lies below share x 2^32 are held out.

    When share > 0 but no bucket is that low, the group with the lowest bucket is held out, so that a small folder has
    held-out text too. When all documents would be held out, none is.
    """
    held = buckets < np.uint64(share * 2**32)
    if share > 0 and len(buckets) and not held.any():
        held = buckets == buckets.min()
    return np.zeros_like(held) if held.all() else held


def describe_held_out(corpus: Corpus, share: float) -> str | None:
    """Say what part of a source is held out, where that is far more than data.heldout=`share`; else None.

    corpus: the source's training documents. Documents are held out by the hash of their names, so one long document may
    hold most of the tokens.
    """
    lengths = corpus.held_lengths
    held = int(lengths.sum(dtype=np.int64))
    part = held / max(held + corpus.total, 1)
    if part <= 2 * share + 0.05:
        return None
    return (
        f"source {corpus.name}: {part:.0%} of its tokens are held out from training, in {len(lengths):,} of its "
        f"documents (the longest has {lengths.max():,} tokens), since data.heldout={share:g} is a share of documents, "
        "not of tokens; split the long ones, or take another data.heldout (0 holds nothing out)"
    )


def check_tally(name: str, tally: Tally, max_bad: float, *, documents: int) -> None:
    """Raise UserError when more records are broken than `max_bad` allows, or when no document is left."""
    if tally.seen and tally.broken > max_bad * tally.seen:
        raise UserError(
            f"data.sources.{name}: {tally.broken} of {tally.seen} records are broken, more than "
            f"data.max_bad={max_bad:g} allows: {'; '.join(tally.where)}; fix them, or raise data.max_bad to skip them"
        )
    if documents == 0:
        first = "; ".join(tally.where)
        raise UserError(
            f"data.sources.{name} has no usable document: of {tally.seen} records {tally.empty} are empty, "
            f"{tally.special} are only special tokens, {tally.not_utf8} are not UTF-8, {tally.broken} are broken"
            + (f" ({first})" if first else "")
            + "; give it documents with text, encoded as UTF-8"
        )


def describe_tally(name: str, tally: Tally, source: SourceConfig) -> str | None:
    """Return a sentence about the skipped records and the replies that count as context, or None without them."""
    parts = [
        (tally.empty, "empty"),
        (tally.special, "only special tokens"),
        (tally.not_utf8, "not UTF-8"),
        (tally.broken, "broken"),
    ]
    said = [f"{count} {what}" for count, what in parts if count]
    first = f" ({'; '.join(tally.where)})" if tally.where else ""
    words = [f"of {tally.seen} records {', '.join(said)}, skipped{first}"] if said else []
    if tally.rewritten and (source.loss == "assistant" or source.answer_weight is not None):
        words.append(
            f"{tally.rewritten} replies count as context, because the chat template shows them otherwise once other "
            "turns follow"
        )
    return f"{name}: {'; '.join(words)}" if words else None
