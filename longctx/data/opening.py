"""Opening a stage: sources tokenized where they are not yet, the plan made, and what does not fit refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from longctx.config.data import DataConfig, Mix
from longctx.console import warn
from longctx.data.index import Corpus, Split, check_tally, describe_tally
from longctx.data.plan import make_plan
from longctx.data.prepare import build_source
from longctx.data.stage import StageData
from longctx.data.writer import Writer
from longctx.errors import UserError, nearest


def open_stage(
    data: DataConfig,
    *,
    mix: str,
    seq_len: int,
    sequences: int,
    tokenizer: Any,
    seed: int,
    split: Split,
    cache: Path,
    stage: str,
    vocab_size: int | None = None,
    workers: int | None = None,
    report: Any = None,
) -> StageData:
    """A stage's sequences, tokenizing what is not in `cache` yet.

    sequences: how many the stage needs; sources are repeated where they are shorter, with a warning beyond
    data.max_epochs. split: `heldout` reads the held-out documents and draws synthetic keys of the evaluation
    side. vocab_size: the model's, to refuse a tokenizer that exceeds it. report(source, done, total): bytes.
    Raises UserError for an unknown mix, unusable sources, or a policy that no document can fill.
    """
    chosen = choose_mix(data, mix, stage)
    needed = [name for name, entry in chosen.items() if entry.weight > 0]
    straw = [str(data.sources[name].haystack) for name in needed if data.sources[name].kind == "synth"]
    texts = [name for name in dict.fromkeys([*needed, *straw]) if data.sources[name].kind != "synth"]
    corpora = {
        name: open_source(name, data, tokenizer, cache, split=split, workers=workers, report=report) for name in texts
    }
    for name in straw:
        if corpora[name].total <= 256:
            raise UserError(
                f"data.sources.{name} serves as haystack and has {corpora[name].total} tokens in its {split} "
                "documents; give it more documents, or raise data.heldout"
            )
    writer = Writer(tokenizer) if straw else None
    if vocab_size is not None:
        largest = max([corpus.largest_id for corpus in corpora.values()] + ([len(tokenizer) - 1] if straw else []))
        check_vocabulary(largest, vocab_size)
    lengths = {name: corpora[name].lengths for name in texts}
    plan = make_plan(data, chosen, lengths, seq_len=seq_len, sequences=sequences, seed=seed, stage=f"{stage}/{split}")
    if split == "train":
        for name, use in plan.use.items():
            if use.epochs > data.max_epochs:
                warn(
                    f"stage {stage} reads source {name} {use.epochs:.1f} times, more than data.max_epochs="
                    f"{data.max_epochs:g}; add documents or lower its weight in data.mixes.{mix}"
                )
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    return StageData(data, plan, corpora, writer, pad=pad, seed=seed, stage=stage, split=split)


def choose_mix(data: DataConfig, mix: str, stage: str) -> Mix:
    """The mix a stage names. Raises UserError with the nearest known name."""
    if mix not in data.mixes:
        near = nearest(mix, data.mixes)
        hint = f"did you mean {near!r}?" if near else f"known: {', '.join(data.mixes)}"
        raise UserError(f"curriculum.stages.{stage}.mix={mix} is not one of data.mixes; {hint} (configs/data)")
    return data.mixes[mix]


def open_source(
    name: str,
    data: DataConfig,
    tokenizer: Any,
    cache: Path,
    *,
    split: Split,
    workers: int | None = None,
    report: Any = None,
) -> Corpus:
    """A source's documents of one split, tokenized where they are not yet; says what was skipped."""

    def forward(done: int, total: int) -> None:
        report(name, done, total)

    folders, fresh = build_source(name, data, tokenizer, cache, workers=workers, report=forward if report else None)
    corpus = Corpus(name, data.sources[name], folders, split=split, heldout=data.heldout)
    everything = sum(shard.meta["documents"] for shard in corpus.shards)
    check_tally(name, corpus.tally, data.max_bad, documents=everything)
    skipped = describe_tally(name, corpus.tally)
    if skipped and fresh:  # said once, not at every start and by every rank
        warn(skipped)
    return corpus


def check_vocabulary(largest: int, vocab_size: int) -> None:
    """Raises UserError when a token id has no row in the model's embedding."""
    if largest >= vocab_size:
        raise UserError(
            f"the tokenizer gives ids up to {largest} and the model has vocab_size={vocab_size}; use the "
            "model's own tokenizer, or resize its embeddings first (model.path)"
        )
