"""Tokenize a source into shards: find the missing shards and write them, in one process at a time.

The files alone determine the shards, their order and their contents; the number of workers changes only the time.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from longctx.config.data import DataConfig, SourceConfig
from longctx.console import say
from longctx.data.documents import Unit
from longctx.data.shard import FORMAT
from longctx.data.sources import source_units
from longctx.data.tokens import ShardJob, TokenizerSpec, tokenize_shard
from longctx.data.worker_pool import tokenize_by
from longctx.errors import UserError
from longctx.fingerprint import file_hashes
from longctx.processes import warn_if_crowded
from longctx.signals import sweep
from longctx.storage.files import only_writer

SMALLEST_SHARD = 2**20  # bytes of input
LARGEST_SHARD = 2**26
_INLINE = 2 * 2**20  # bytes of input below which starting workers costs more time than it saves


def tokenizer_spec(tokenizer: Any, data: DataConfig, source: SourceConfig) -> TokenizerSpec:
    """Return the parts of a Hugging Face tokenizer that the workers need. Raises UserError for a slow tokenizer."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UserError(
            f"the tokenizer {type(tokenizer).__name__} is not a fast tokenizer; load one with use_fast=True"
        )
    chat = source.kind == "chat"
    return TokenizerSpec(
        json=backend.to_str(),
        bos=tokenizer.bos_token_id if data.bos and not chat else None,
        eos=tokenizer.eos_token_id if data.eos and not chat else None,
        special=tuple(sorted({*tokenizer.all_special_tokens})),
        size=max(tokenizer.get_vocab().values()) + 1,  # ids may have gaps, so that the largest is above their number
        chat=tokenizer if chat else None,
    )


def build_source(
    name: str,
    data: DataConfig,
    tokenizer: Any,
    cache: Path,
    *,
    workers: int | None = None,
    report: Any = None,
) -> tuple[list[Path], bool]:
    """Tokenize a source's missing shards; returns the folders of all shards in order, and whether any was missing.

    It says how many of the shards it tokenizes, and with `report` also that it found all of them. report(done, total)
    is called with bytes when a shard is finished. Raises UserError for a source that cannot be read.
    """
    source = data.sources[name]
    cache = Path(cache).expanduser()
    spec = tokenizer_spec(tokenizer, data, source)
    jobs = shard_jobs(source_units(name, source, cache), spec, cache)
    total = sum(job.size for job in jobs)
    fresh = any(not _complete(job) for job in jobs)
    if not fresh and report is not None:
        say(f"{name}: found stored, {len(jobs)} of {len(jobs)} shards")
    if fresh:
        # All sources share one lock, since two of them may share shards: a folder, and it with a file more.
        waiting = f"waiting for another process that tokenizes into {cache}"
        (cache / "shards").mkdir(parents=True, exist_ok=True)
        with only_writer(cache / "locks" / "shards", waiting) as alone:
            if alone:
                sweep(cache / "shards", names={job.folder.name for job in jobs})  # left by a killed process
            missing = [job for job in jobs if not _complete(job)]
            size = sum(job.size for job in missing)
            if missing:
                say(f"{name}: tokenizing {len(missing)} of {len(jobs)} shards, {size / 2**20:,.1f} MiB of input")
            done = total - size
            for job in _run(missing, spec, workers):
                done += job.size
                if report is not None:
                    report(done, total)
    return [job.folder for job in jobs], fresh


def _complete(job: ShardJob) -> bool:
    return (job.folder / "meta.json").exists()


def _run(jobs: Sequence[ShardJob], spec: TokenizerSpec, workers: int | None) -> Iterator[ShardJob]:
    """Write the shards, in worker processes unless they are small; yields each job when it is finished."""
    count = min(workers or len(os.sched_getaffinity(0)), len(jobs))
    if count <= 1 or sum(job.size for job in jobs) < _INLINE:
        for job in jobs:
            tokenize_shard(job, spec)
            yield job
        return
    warn_if_crowded("workers", count)
    yield from tokenize_by(count, jobs, spec, jobs[0].folder.parent)


def shard_jobs(units: Sequence[Unit], spec: TokenizerSpec, cache: Path) -> list[ShardJob]:
    """Group units into shards, in order; the grouping depends on the units alone."""
    total = sum(unit.size for unit in units)
    step = min(max(total // 16, SMALLEST_SHARD), LARGEST_SHARD)
    hashes = file_hashes(sorted({Path(unit.path) for unit in units}), cache / "file_hashes.json")
    tokenizer = spec.fingerprint()
    groups: list[list[Unit]] = [[]]
    size = 0
    for unit in units:
        if groups[-1] and size + unit.size > step:
            groups.append([])
            size = 0
        groups[-1].append(unit)
        size += unit.size
    jobs = []
    for group in groups:
        what = [[u.name, u.kind, u.column, u.start, u.end, hashes[Path(u.path)]] for u in group]
        key = hashlib.sha256(json.dumps([FORMAT, tokenizer, what]).encode()).hexdigest()[:32]
        jobs.append(ShardJob(tuple(group), cache / "shards" / key))
    return jobs
