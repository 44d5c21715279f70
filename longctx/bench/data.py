"""`longctx bench data`: measure tokenizing, packing and reading, and one sequence of 2^20 tokens for 8 ranks.

Tokenizing is compared with the tokenizer alone in the same run. Packing uses an index of ten million documents;
reading uses shards in the page cache.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from longctx.config.base import build
from longctx.config.data import DataConfig
from longctx.config.data_verbs import BenchDataConfig
from longctx.console import emit, emit_json, say
from longctx.host_memory import peak_resident
from longctx.storage.files import GIB


def run(config: BenchDataConfig) -> int:
    """Measure config.parts; prints lines or one JSON document, which is also written to `out`."""
    import json

    figures: dict[str, Any] = {"cores": len(os.sched_getaffinity(0))}
    parts: dict[str, Callable[[BenchDataConfig], Any]] = {
        "tokenize": tokenize,
        "pack": pack,
        "read": read,
        "million": million,
    }
    for part in config.parts:
        figures[part] = parts[part](config)
    if config.out:
        Path(config.out).parent.mkdir(parents=True, exist_ok=True)
        Path(config.out).write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    if config.format == "json":
        emit_json(figures)
    else:
        emit(_words(figures))
    return 0


def tokenize(config: BenchDataConfig) -> dict[str, float]:
    """Tokenize standard-library text with the whole pipeline, and with the tokenizer alone and its own threads.

    The pipeline reads files, starts workers and writes shards. Both run twice in turn; the better time counts.
    """
    from longctx.data.documents import Tally, read_text
    from longctx.data.prepare import build_source
    from longctx.data.stdlib import stdlib_files
    from longctx.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(config.model)
    with tempfile.TemporaryDirectory() as work:
        texts: list[str] = []
        missing = config.megabytes * 10**6
        files = stdlib_files()
        while missing > 0:
            for path, _ in files:
                text = read_text(path, path.name, Tally())
                if text and missing > 0:
                    texts.append(text)
                    missing -= len(text)
        folder = Path(work) / "text"
        folder.mkdir()
        for number, text in enumerate(texts):
            (folder / f"{number:06d}.txt").write_text(text, encoding="utf-8")
        values = {"sources": {"text": {"kind": "text", "path": str(folder)}}, "mixes": {"m": {"text": 1.0}}}
        data = build(DataConfig, values, origin="bench data")
        alone, piped = [], []
        tokens = 0
        for attempt in range(2):
            say(f"tokenize: {config.megabytes} MB of text alone and by the pipeline, turn {attempt + 1} of 2 ...")
            begin = time.perf_counter()
            encodings = tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)
            alone.append(time.perf_counter() - begin)
            tokens = sum(len(encoding) for encoding in encodings)
            del encodings
            begin = time.perf_counter()
            build_source("text", data, tokenizer, Path(work) / f"cache{attempt}", workers=config.workers)
            piped.append(time.perf_counter() - begin)
    return {
        "tokens": tokens,
        "tokenizer_alone_tokens_per_s": tokens / min(alone),
        "pipeline_tokens_per_s": tokens / min(piped),
        "ratio": min(alone) / min(piped),
    }


def pack(config: BenchDataConfig) -> list[dict[str, float]]:
    """Draw, mix and pack the whole index, each length in a new process; returns seconds and peak memory."""
    context = multiprocessing.get_context("spawn")
    found = []
    for seq_len in config.seq_lens:
        say(f"pack: drawing and packing {config.documents:,} documents to {seq_len:,} tokens ...")
        with ProcessPoolExecutor(1, mp_context=context) as pool:  # which passes on how a process failed
            found.append(pool.submit(_pack_once, config.documents, seq_len, config.seed).result())
    return found


def realistic_lengths(count: int, rng: np.random.Generator) -> np.ndarray:
    """Draw document lengths, int32: lognormal (median 665 tokens), and 0.2 % from a Pareto tail up to 2^21."""
    lengths = np.exp(rng.normal(6.5, 1.3, count))
    tail = rng.random(count) < 0.002
    lengths[tail] = 8192 * (1 + rng.pareto(1.1, int(tail.sum())))
    return np.clip(lengths, 16, 2**21).astype(np.int32)


def _pack_once(documents: int, seq_len: int, seed: int) -> dict[str, float]:
    from longctx.data.stage_packing import pack_stage

    rng = np.random.default_rng(seed)
    shares = {"web": 0.6, "books": 0.1, "code": 0.3}
    lengths = {name: realistic_lengths(round(share * documents), rng) for name, share in shares.items()}
    total = sum(int(values.sum(dtype=np.int64)) for values in lengths.values())
    weights = {name: float(values.sum(dtype=np.int64)) / total for name, values in lengths.items()}
    mix: dict[str, Any] = {name: {"weight": weight} for name, weight in weights.items()}
    mix["code"]["length"] = {"upsample": {"min_len": 8192, "share": 0.5}}
    values = {"sources": {n: {"kind": "text", "path": n} for n in shares}, "mixes": {"m": mix}}
    data = build(DataConfig, values, origin="bench data")
    before = peak_resident() / GIB
    begin = time.perf_counter()
    packing = pack_stage(
        data, data.mixes["m"], lengths, seq_len=seq_len, sequences=total // seq_len, seed=seed, stage="bench"
    )
    seconds = time.perf_counter() - begin
    return {
        "seq_len": seq_len,
        "documents": documents,
        "tokens": total,
        "sequences": len(packing),
        "pieces": len(packing.length),
        "seconds": seconds,
        "peak_gib": peak_resident() / GIB,
        "before_gib": before,
        "padding": packing.padding,
    }


def read(config: BenchDataConfig) -> list[dict[str, float]]:
    """Read whole packed sequences (tokens, weights, boundaries, names) from shards in the page cache."""
    found = []
    with tempfile.TemporaryDirectory() as work:
        for seq_len in config.seq_lens:
            sequences = max(8, 2**25 // seq_len)
            say(f"read: writing shards of {sequences:,} x {seq_len:,} random tokens in {work}, read twice ...")
            stage = random_stage(Path(work), seq_len, sequences, config.seed)
            for index in range(len(stage)):  # into the page cache
                stage.sequence(index)
            begin = time.perf_counter()
            for index in range(len(stage)):
                stage.sequence(index)
            seconds = time.perf_counter() - begin
            pieces = len(stage.packing.length) / len(stage)
            rate = len(stage) * seq_len / seconds
            found.append({"seq_len": seq_len, "pieces_per_sequence": pieces, "tokens_per_s": rate})
    return found


def million(config: BenchDataConfig) -> dict[str, float]:
    """Read a sequence of 2^20 tokens for 8 zigzag ranks; returns the peak allocation of a rank and of the whole."""
    seq_len, ranks = 2**20, 8
    with tempfile.TemporaryDirectory() as work:
        say(f"million: writing shards of 8 x {seq_len:,} random tokens in {work}, read by 8 ranks ...")
        stage = random_stage(Path(work), seq_len, 8, config.seed)
        whole = _peak(lambda: stage.sequence(0))
        chunk = seq_len // (2 * ranks)
        peaks, seconds, seen = [], [], np.full(seq_len, -1, np.int32)
        for rank in range(ranks):
            late = (2 * ranks - 1 - rank) * chunk
            positions = np.concatenate([np.arange(rank * chunk, (rank + 1) * chunk), np.arange(late, late + chunk)])
            begin = time.perf_counter()
            seen[positions] = stage.local(0, positions).tokens
            seconds.append(time.perf_counter() - begin)
            peaks.append(_peak(lambda at=positions: stage.local(0, at)))
        assert np.array_equal(seen, stage.sequence(0).tokens), "the ranks together hold the sequence"
    return {
        "whole_sequence_mib": whole / 2**20,
        "rank_mib": max(peaks) / 2**20,
        "rank_tokens": seq_len // ranks,
        "rank_seconds": max(seconds),
    }


def _peak(call: Callable[[], Any]) -> int:
    """Return the peak of allocated bytes during a call."""
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def random_stage(work: Path, seq_len: int, sequences: int, seed: int) -> Any:
    """Make a stage from one shard of random tokens with realistic document lengths."""
    from longctx.data.corpus import Corpus
    from longctx.data.documents import Tally
    from longctx.data.shard import TokenizedDocument, write_shard
    from longctx.data.stage_data import StageData
    from longctx.data.stage_packing import pack_stage

    rng = np.random.default_rng(seed)
    lengths = realistic_lengths(max(64, sequences * seq_len // 800), rng)
    lengths = np.minimum(lengths, 2**18)
    folder = work / f"shard{seq_len}"
    rows = (
        TokenizedDocument(f"doc/{i}", f"doc/{i}", rng.integers(0, 32000, n, dtype=np.uint16))
        for i, n in enumerate(lengths.tolist())
    )
    write_shard(folder, rows, np.uint16, masked=False, tally=Tally())
    values = {"sources": {"text": {"kind": "text", "path": "x"}}, "mixes": {"m": {"text": 1.0}}}
    data = build(DataConfig, values, origin="bench data")
    corpus = Corpus("text", data.sources["text"], [folder], split="train", heldout=0.0)
    packing = pack_stage(
        data,
        data.mixes["m"],
        {"text": corpus.lengths},
        seq_len=seq_len,
        sequences=sequences,
        seed=seed,
        stage="b",
    )
    return StageData(data, packing, {"text": corpus}, None, pad=0, seed=seed, stage="b", split="train")


def _words(figures: dict[str, Any]) -> str:
    lines = [f"{figures['cores']} cores"]
    if part := figures.get("tokenize"):
        lines.append(
            f"tokenizing {part['tokens']:,} tokens: {part['pipeline_tokens_per_s']:,.0f} tokens/s, "
            f"{part['ratio']:.2f} of the tokenizer alone ({part['tokenizer_alone_tokens_per_s']:,.0f})"
        )
    for part in figures.get("pack", []):
        lines.append(
            f"packing {part['documents']:,} documents to {part['seq_len']:,}: {part['seconds']:.1f} s, peak "
            f"{part['peak_gib']:.2f} GiB, padding {part['padding']:.3%}"
        )
    for part in figures.get("read", []):
        lines.append(f"reading sequences of {part['seq_len']:,}: {part['tokens_per_s'] / 1e6:,.0f} M tokens/s")
    if part := figures.get("million"):
        lines.append(
            f"2^20 tokens to 8 ranks: {part['rank_mib']:.1f} MiB allocated by a rank, "
            f"{part['whole_sequence_mib']:.1f} MiB for the whole, {part['rank_seconds'] * 1e3:.1f} ms"
        )
    return "\n".join(lines)
