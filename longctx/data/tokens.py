"""Tokenize documents into shards that are addressed by their content.

A shard's name is a hash of its files' contents, of the way they are read and of the tokenizer, so that no document is
tokenized twice and no outdated shard is used. A shard is written to a temporary folder and renamed when it is
complete, so an interrupted run continues with the next shard and two processes may write the same shard.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from longctx.data.documents import Document, Tally, Unit
from longctx.data.files import read
from longctx.data.shard import TokenizedDocument, write_shard
from longctx.data.tokenizer import plain_tokenizer
from longctx.signals import beside, temporary
from longctx.storage.files import naming, sync

_BATCH_CHARACTERS = 1 << 20
_MARKS = 2  # raise when another choice of tokens is marked as the assistant's


@dataclass(frozen=True)
class TokenizerSpec:
    """A tokenizer in the form that is sent to a worker.

    json: the `tokenizers` serialization. bos, eos: the ids added around a document, or None. special: texts of the
    special tokens. size: one more than the largest id, added tokens included. chat: the transformers tokenizer
    that renders conversations; None for text.
    """

    json: str
    bos: int | None
    eos: int | None
    special: tuple[str, ...]
    size: int
    chat: Any = None

    def fingerprint(self) -> str:
        template = getattr(self.chat, "chat_template", None)
        # A template may write bos_token and its like, which stand outside of `json`.
        marks = "" if self.chat is None else f"|{_MARKS}|{self.chat.special_tokens_map}{_date(self.chat)}"
        text = f"{self.json}|{self.bos}|{self.eos}|{template}{marks}"
        return hashlib.sha256(text.encode()).hexdigest()


def _date(tokenizer: Any) -> str:
    from longctx.data.chat import DATE, writes_date

    return f"|{DATE:%Y-%m-%d}" if writes_date(tokenizer) else ""


@dataclass(frozen=True)
class ShardJob:
    """One shard to write: its units and its folder."""

    units: tuple[Unit, ...]
    folder: Path

    @property
    def size(self) -> int:
        return sum(unit.size for unit in self.units)


def tokenize_shard(job: ShardJob, spec: TokenizerSpec) -> None:
    """Read a shard's units, tokenize them, and write the shard, unless it exists."""
    if (job.folder / "meta.json").exists():
        return
    with temporary(beside(job.folder)) as partial, naming(job.folder, partial):
        tally = Tally()
        dtype = np.uint16 if spec.size <= 2**16 else np.uint32
        write_shard(partial, _rows(job, spec, tally), dtype, masked=spec.chat is not None, tally=tally)
        try:
            os.rename(partial, job.folder)
            sync(job.folder.parent)
        except OSError:
            if not (job.folder / "meta.json").exists():  # else another process has written the same shard
                raise


def _rows(job: ShardJob, spec: TokenizerSpec, tally: Tally) -> Iterator[TokenizedDocument]:
    encode = _chat_encoder(spec, tally) if spec.chat is not None else _text_encoder(spec, tally)
    for batch in _batches(job, tally):
        for document, tokens, mask in encode(batch):
            yield TokenizedDocument(document.id, document.group, tokens, mask)


def _batches(job: ShardJob, tally: Tally) -> Iterator[list[Document]]:
    batch: list[Document] = []
    characters = 0
    for unit in job.units:
        for document in read(unit, tally):
            batch.append(document)
            characters += len(document.content) if isinstance(document.content, str) else 1000
            if characters >= _BATCH_CHARACTERS:
                yield batch
                batch, characters = [], 0
    if batch:
        yield batch


def _backend(spec: TokenizerSpec) -> Any:
    backend = _tokenizer(spec.json)
    backend.encode_special_tokens = spec.chat is None
    return backend


@lru_cache(maxsize=2)
def _tokenizer(json: str) -> Any:
    """Build a tokenizer once for all shards: its cache of words makes it a third faster."""
    backend = plain_tokenizer(json)
    # Without special tokens all it could do is to trim spaces off the offsets, which mark the assistant's tokens.
    backend.post_processor = None
    return backend


def _text_encoder(spec: TokenizerSpec, tally: Tally) -> Any:
    """Return the encoder of text documents; a text such as <|end_of_text|> within them is no special token."""
    backend = _backend(spec)
    only_special = re.compile(r"(?:\s|" + "|".join([re.escape(token) for token in spec.special] or [r"\s"]) + ")*")
    head = [] if spec.bos is None else [spec.bos]
    tail = [] if spec.eos is None else [spec.eos]

    def usable(document: Document) -> bool:
        if not isinstance(document.content, str):
            tally.broken += 1
            tally.note(document.location, "a list where text is expected")
            return False
        if not document.content.strip():
            tally.empty += 1
            return False
        if only_special.fullmatch(document.content):
            tally.special += 1
            return False
        try:
            document.content.encode()
        except UnicodeEncodeError as error:  # half a surrogate pair, which JSON allows and tokenizers refuse
            tally.broken += 1
            tally.note(document.location, error)
            return False
        return True

    def encode(batch: list[Document]) -> Iterator[tuple[Document, np.ndarray, None]]:
        kept = [document for document in batch if usable(document)]
        encodings = backend.encode_batch_fast([d.content for d in kept], add_special_tokens=False)
        for document, encoding in zip(kept, encodings, strict=True):
            if encoding.ids:
                yield document, np.array(head + encoding.ids + tail, np.uint32), None
            else:  # characters that the tokenizer drops
                tally.empty += 1

    return encode


def _chat_encoder(spec: TokenizerSpec, tally: Tally) -> Any:
    from longctx.data.chat import conversation

    backend = _backend(spec)

    def encode(batch: list[Document]) -> Iterator[tuple[Document, np.ndarray, np.ndarray]]:
        for document in batch:
            made = conversation(document, spec.chat, backend, tally)
            if made is not None:
                yield document, *made

    return encode
