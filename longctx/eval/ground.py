"""What every model is examined on: the held-out documents of a source, and a writer for the tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from longctx.identity import key_of

if TYPE_CHECKING:
    from longctx.config.data import DataConfig
    from longctx.data.writer import Haystack, Writer


@dataclass(frozen=True)
class Ground:
    """key: what the held-out documents and their tokens follow from."""

    writer: Writer
    haystack: Haystack
    key: str


def open_ground(data: DataConfig, source: str, tokenizer: Path | str, cache: Path) -> Ground:
    """Held-out documents of a source as haystack; tokenizer: a folder or hub id."""
    from longctx.data.opening import open_source
    from longctx.data.tokenizer import tokenizer_at
    from longctx.data.writer import Writer, corpus_haystack

    made = tokenizer_at(tokenizer, "model.tokenizer")
    writer = Writer(made)
    corpus = open_source(source, data, made, cache, split="heldout")
    # Shards are named by their documents' content and the tokenizer.
    shards, entry = [shard.folder.name for shard in corpus.shards], data.sources[source]
    key = key_of({"shards": shards, "heldout": data.heldout, "tokens": [entry.min_tokens, entry.max_tokens]})
    return Ground(writer, corpus_haystack(corpus, writer), key)
