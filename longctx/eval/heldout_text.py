"""The held-out text on which models are evaluated, in the tokens of one tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from longctx.data.check import check_text_source
from longctx.errors import UserError
from longctx.fingerprint import fingerprint_of

if TYPE_CHECKING:
    from longctx.config.data import DataConfig
    from longctx.data.haystack import Haystack, NeedleWriter


@dataclass(frozen=True)
class HeldoutText:
    """Held-out text in one tokenizer's tokens.

    key: the fingerprint of the documents and their tokens. tokens: the number of tokens. largest_id: the largest token
    id in text and needles.
    """

    writer: NeedleWriter
    haystack: Haystack
    key: str
    tokens: int
    largest_id: int


def open_heldout_text(data: DataConfig, source: str, tokenizer: Path | str, cache: Path) -> HeldoutText:
    """Open a source's held-out documents as a haystack; missing shards are tokenized.

    tokenizer: a folder or hub id. Raises UserError for an unknown source, a tokenizer that cannot be read, and a
    source without held-out documents.
    """
    from longctx.data.haystack import NeedleWriter, corpus_haystack
    from longctx.data.stage_opening import open_source
    from longctx.data.tokenizer import tokenizer_at

    check_text_source(data, source, "source")
    made = tokenizer_at(tokenizer, "model.tokenizer")
    writer = NeedleWriter(made, bos=data.bos)
    corpus = open_source(source, data, made, cache, split="heldout")
    if corpus.total == 0:
        raise UserError(
            f"source={source} holds out no document at data.heldout={data.heldout:g}, and models are evaluated on text "
            f"that training does not see; {corpus.hold_out_more(data.heldout)}"
        )
    # A shard's name is a hash of its documents' content and the tokenizer.
    shards, entry = [shard.folder.name for shard in corpus.shards], data.sources[source]
    prompts = {} if data.bos else {"bos": False}  # shards of conversations do not depend on data.bos, and prompts do
    key = fingerprint_of(
        {"shards": shards, "heldout": data.heldout, "tokens": [entry.min_len, entry.max_len], **prompts}
    )
    largest = max(corpus.largest_id, int(writer.ordinary.max()))  # needles contain no added tokens
    return HeldoutText(writer, corpus_haystack(corpus, writer), key, corpus.total, largest)
