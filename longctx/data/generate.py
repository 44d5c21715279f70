"""`longctx data synth`: write documents of a synthetic task to a .jsonl file, for people and other tools."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from longctx.config.data_verbs import SynthesizeConfig
from longctx.console import emit, emit_json, progress
from longctx.data.check import check_sources, check_text_source
from longctx.data.haystack import Haystack, NeedleWriter, corpus_haystack
from longctx.data.mixing import rng_of
from longctx.data.stage_opening import open_source
from longctx.data.synth import SynthDocument, make_task
from longctx.data.tokenizer import load_tokenizer
from longctx.errors import UserError
from longctx.storage.files import replacing


def run(config: SynthesizeConfig) -> int:
    """Write config.count documents to config.out, one JSON object per line."""
    check_text_source(config.data, config.haystack, "haystack")
    check_sources(config.data, [config.haystack], Path(config.cache))
    tokenizer = load_tokenizer(config.model)
    split = "train" if config.keys == "train" else "heldout"
    corpus = open_source(config.haystack, config.data, tokenizer, Path(config.cache), split=split)
    if not len(corpus):
        more = corpus.hold_out_more(config.data.heldout)
        raise UserError(f"haystack={config.haystack} has no {split} documents; {more}, or take keys=train")
    writer = NeedleWriter(tokenizer, bos=config.data.bos)
    haystack = corpus_haystack(corpus, writer)
    path = Path(config.out)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:  # a refused length leaves no file behind
        longest = _write(config, tokenizer, haystack, writer, partial)
    if config.format == "json":
        tokens = config.count * config.length
        emit_json({"out": str(path), "documents": config.count, "tokens": tokens, "longest_text": longest})
    else:
        emit(
            f"{config.count} documents of {config.length:,} tokens, task {config.task.kind}, {config.keys} keys: {path}"
        )
        emit(f"the field text, read as data with its marks (data.bos, data.eos): at most {longest:,} tokens")
    return 0


def _write(config: SynthesizeConfig, tokenizer: Any, haystack: Haystack, writer: NeedleWriter, path: Path) -> int:
    """Write the documents; returns the most tokens that a text has where a source reads it."""
    marks = len(writer.head) + (config.data.eos and writer.eos is not None)
    longest = 0
    with path.open("w", encoding="utf-8") as out, progress() as bar:
        for number in bar.track(range(config.count), description="documents"):
            rng = rng_of(config.seed, "synth", config.task.kind, config.keys, number)
            made = make_task(config.task, config.length, rng, haystack, keys=config.keys, tokenizer=writer)
            text = tokenizer.decode(made.tokens[len(writer.head) :])
            longest = max(longest, len(writer.tokens(text)) + marks)
            out.write(json.dumps(_row(made, config, number, text), ensure_ascii=False) + "\n")
    return longest


def _row(made: SynthDocument, config: SynthesizeConfig, number: int, text: str) -> dict[str, Any]:
    return {
        "id": f"{config.task.kind}/{config.keys}/{config.seed}/{number}",
        "task": config.task.kind,
        "text": text,
        "tokens": made.tokens.tolist(),
        "answers": [
            {"start": a.start, "end": a.end, "key": a.key, "text": a.text, "depth": round(a.depth, 4)}
            for a in made.answers
        ],
        "needles": list(made.needles),
    }
