"""A source's documents as one indexed list: lengths at hand, tokens read from the memory map on demand.

Which documents are training and which are held out, and the token filters, are decided here and cost no
tokenizing. D documents of this split.
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


class Corpus:
    """A source's documents of one split.

    lengths: int32 [D] tokens of each; tally: what reading met over both splits.
    """

    def __init__(
        self, name: str, source: SourceConfig, folders: Sequence[Path], *, split: Split, heldout: float
    ) -> None:
        self.name = name
        self.source = source
        self.shards = [Shard(folder) for folder in folders]
        self.tally = Tally()
        for shard in self.shards:
            self.tally.add(Tally.of(shard.meta["tally"]))
        lengths = np.concatenate([np.diff(shard.starts) for shard in self.shards]).astype(np.int32)
        buckets = np.concatenate([shard.buckets for shard in self.shards])
        keep = held_out(buckets, heldout) == (split == "heldout")
        keep &= lengths >= source.min_tokens
        if source.max_tokens is not None:
            keep &= lengths <= source.max_tokens
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
        """Tokens of all documents of this split."""
        return int(self.lengths.sum(dtype=np.int64))

    @property
    def key(self) -> str:
        """A hash of what the shards hold: each is named by its documents' content and the tokenizer."""
        return fingerprint_of({"shards": [shard.folder.name for shard in self.shards]})

    @property
    def largest_id(self) -> int:
        return max(shard.meta["largest_id"] for shard in self.shards)

    def document_name(self, document: int) -> str:
        return self.shards[self._shard[document]].name(int(self._within[document]))

    def read(self, document: int, start: int, count: int) -> np.ndarray:
        """Tokens [start, start + count) of a document: a view into the memory map, uint16 or uint32."""
        at = int(self._address[document]) + start
        return self.shards[self._shard[document]].tokens[at : at + count]

    def read_mask(self, document: int, start: int, count: int) -> np.ndarray | None:
        """uint8, 1 where the assistant speaks; None for text."""
        mask = self.shards[self._shard[document]].mask
        at = int(self._address[document]) + start
        return None if mask is None else mask[at : at + count]


def held_out(buckets: np.ndarray, share: float) -> np.ndarray:
    """Which documents are held out: those whose bucket lies below share x 2^32; where share > 0 but none
    does, the group with the lowest bucket, so that a small folder has a held-out file too."""
    held = buckets < np.uint64(share * 2**32)
    if share > 0 and len(buckets) and not held.any():
        held = buckets == buckets.min()
    return np.zeros_like(held) if held.all() else held


def check_tally(name: str, tally: Tally, max_bad: float, *, documents: int) -> None:
    """Raises UserError when too much was broken, or nothing is left."""
    if tally.seen and tally.broken > max_bad * tally.seen:
        raise UserError(
            f"data.sources.{name}: {tally.broken} of {tally.seen} records are broken, more than "
            f"data.max_bad={max_bad:g} allows: {'; '.join(tally.where)}; mend them, or raise data.max_bad to skip them"
        )
    if documents == 0:
        first = "; ".join(tally.where)
        raise UserError(
            f"data.sources.{name} has no usable document: of {tally.seen} records {tally.empty} are empty, "
            f"{tally.special} are only special tokens, {tally.not_utf8} are not UTF-8, {tally.broken} are "
            "broken" + (f" ({first})" if first else "") + "; give it documents with text, encoded as UTF-8"
        )


def describe_tally(name: str, tally: Tally) -> str | None:
    """One sentence about what was skipped, or None when nothing was."""
    parts = [
        (tally.empty, "empty"),
        (tally.special, "only special tokens"),
        (tally.not_utf8, "not UTF-8"),
        (tally.broken, "broken"),
    ]
    said = [f"{count} {what}" for count, what in parts if count]
    if not said:
        return None
    first = f" ({'; '.join(tally.where)})" if tally.where else ""
    return f"{name}: of {tally.seen} records {', '.join(said)}, skipped{first}"
