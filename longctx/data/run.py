"""`longctx data`: tokenize every source and print its counts."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

from longctx.config.data import DataConfig
from longctx.config.data_verbs import PrepareConfig
from longctx.console import emit, emit_json, progress, remark
from longctx.data.check import check_sources
from longctx.data.corpus import Corpus, describe_held_out
from longctx.data.stage_opening import check_vocabulary, open_source
from longctx.data.tokenizer import check_tokenizer_of, load_tokenizer
from longctx.errors import UserError
from longctx.shape import shape_of_model


def run(config: PrepareConfig) -> int:
    """Write the shards of all sources with files; prints a table or one JSON document."""
    vocabulary = shape_of_model(config.model).vocab
    check_tokenizer_of(config.model, vocab_size=vocabulary)
    check_sources(config.data, text_sources(config.data), Path(config.shards))
    tokenizer = load_tokenizer(config.model, vocab_size=vocabulary)
    train, heldout = open_both(config, tokenizer)
    check_vocabulary(max(corpus.largest_id for corpus in train.values()), vocabulary)
    document = {name: summary(train[name], heldout[name]) for name in train}
    if config.format == "json":
        emit_json({"cache": config.shards, "tokenizer": len(tokenizer), "sources": document})
    else:
        emit(_table(document))
        emit(f"shards in {config.shards}; `longctx data stats` draws the lengths")
    return 0


def text_sources(data: DataConfig) -> list[str]:
    """Return the sources with files. Raises UserError when there are none."""
    texts = [name for name, source in data.sources.items() if source.kind != "synth"]
    if not texts:
        raise UserError("data.sources names synth sources only; they need a source of text as haystack")
    return texts


def open_both(config: PrepareConfig, tokenizer: Any) -> tuple[dict[str, Corpus], dict[str, Corpus]]:
    """Return the training and the held-out documents of every source with files; missing shards are tokenized.

    Warns of a source of which far more tokens are held out than data.heldout says.
    """
    cache = Path(config.shards)
    texts = text_sources(config.data)
    train: dict[str, Corpus] = {}
    heldout: dict[str, Corpus] = {}
    with ExitStack() as shown:
        bar, tasks = progress(), {}

        def report(name: str, done: int, total: int) -> None:
            if not tasks:
                shown.enter_context(bar)
            if name not in tasks:
                tasks[name] = bar.add_task(f"{name}, KiB", total=None)
            bar.update(tasks[name], completed=done >> 10, total=total >> 10)

        for name in texts:
            train[name] = open_source(
                name, config.data, tokenizer, cache, split="train", workers=config.workers, report=report
            )
            heldout[name] = open_source(name, config.data, tokenizer, cache, split="heldout")
    for corpus in train.values():
        if held := describe_held_out(corpus, config.data.heldout):
            remark(held)
    return train, heldout


def summary(train: Corpus, heldout: Corpus) -> dict[str, Any]:
    """Return the counts of a source: training documents, held-out ones, and skipped records by reason."""
    return {
        "kind": train.source.kind,
        "documents": len(train),
        "tokens": train.total,
        "heldout_documents": len(heldout),
        "heldout_tokens": heldout.total,
        "longest": int(train.lengths.max(initial=0)),
        "skipped": {
            "empty": train.tally.empty,
            "special": train.tally.special,
            "not_utf8": train.tally.not_utf8,
            "broken": train.tally.broken,
        },
        "shards": len(train.shards),
    }


def _table(sources: dict[str, Any]) -> Any:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in (
        "source",
        "documents",
        "tokens",
        "longest",
        "held-out documents",
        "tokens",
        "skipped",
        "shards",
    ):
        table.add_column(title, justify="left" if title == "source" else "right")
    for name, row in sources.items():
        numbers = ("documents", "tokens", "longest", "heldout_documents", "heldout_tokens")
        skipped = sum(row["skipped"].values())
        table.add_row(name, *(f"{row[key]:,}" for key in numbers), f"{skipped:,}", str(row["shards"]))
    return table
