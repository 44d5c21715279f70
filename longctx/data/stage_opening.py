"""Open a stage's data: tokenize its sources, pack its sequences, and refuse what does not fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longctx.config.data import DataConfig, LengthPolicy, Mix
from longctx.console import remark, warn
from longctx.data.corpus import Corpus, Split, Whole, check_tally, describe_held_out, describe_tally
from longctx.data.haystack import NeedleWriter
from longctx.data.mixing import longest_wanted
from longctx.data.prepare import build_source
from longctx.data.stage_data import StageData
from longctx.data.stage_packing import StagePacking, describe_padding, empty_packing, pack_stage
from longctx.errors import UserError, nearest

if TYPE_CHECKING:
    from longctx.curriculum import Stage

_MIN_HAYSTACK = 256  # tokens that a haystack must exceed


def open_stage_data(
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
    remarks: bool = True,
) -> StageData:
    """Return a stage's packed sequences; documents whose shards are not in `cache` are tokenized first.

    sequences: the number that the stage needs; shorter sources are repeated. remarks: warn of sources that are repeated
    beyond data.max_epochs or of which far more tokens are held out than data.heldout says, and of a stage of which more
    than a tenth is padding.
    split: `heldout` reads held-out documents and draws synthetic keys reserved for evaluation. It leaves out sources
    without held-out documents, so it may have no sequence at all. vocab_size: the model's; a tokenizer with larger
    ids is refused. report(source, done, total): called with bytes. Raises UserError for an unknown mix, unusable
    sources, or a length policy that no document can satisfy.
    """
    chosen = choose_mix(data, mix, stage)
    texts = list(dict.fromkeys([*_texts(data, chosen), *_haystacks(data, chosen)]))
    corpora = {
        name: open_source(name, data, tokenizer, cache, split=split, workers=workers, report=report) for name in texts
    }
    for corpus in corpora.values() if remarks and split == "train" else ():
        if held := describe_held_out(corpus, data.heldout):
            remark(held)
    if split == "heldout":
        chosen = _held_out_mix(data, chosen, corpora, seq_len=seq_len, stage=stage)
    haystacks = _haystacks(data, chosen)
    for name in haystacks:
        if corpora[name].total <= _MIN_HAYSTACK:
            raise UserError(
                f"data.sources.{name} serves as haystack in stage {stage} and has {corpora[name].total} tokens in its "
                f"{split} documents, {_MIN_HAYSTACK + 1} are needed; give it more documents"
            )
    writer = NeedleWriter(tokenizer, bos=data.bos) if haystacks else None
    if vocab_size is not None:
        written = [int(writer.ordinary.max())] if writer else []  # needles contain no added tokens
        check_vocabulary(max([corpus.largest_id for corpus in corpora.values()] + written), vocab_size)
    lengths = {name: corpora[name].lengths for name in texts}
    packing = (
        pack_stage(data, chosen, lengths, seq_len=seq_len, sequences=sequences, seed=seed, stage=f"{stage}/{split}")
        if chosen
        else empty_packing(seq_len)
    )
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    opened = StageData(data, packing, corpora, writer, pad=pad, seed=seed, stage=stage, split=split)
    if split == "train":
        opened.check_tasks()
        opened.check_labels()
        if remarks:
            _remark_packing(data, mix, packing, stage)
    return opened


def _remark_packing(data: DataConfig, mix: str, packing: StagePacking, stage: str) -> None:
    for name, use in packing.use.items():
        if use.epochs > data.max_epochs:
            remark(
                f"stage {stage} reads source {name} {use.epochs:.1f} times, more than data.max_epochs="
                f"{data.max_epochs:g}; add documents or lower its weight in data.mixes.{mix}"
            )
    padded = describe_padding(data, mix, packing, stage)
    if padded:
        remark(padded)


def check_stages(
    data: DataConfig,
    stages: Sequence[Stage],
    *,
    tokenizer: Any,
    seed: int,
    cache: Path,
    vocab_size: int | None = None,
    workers: int | None = None,
) -> None:
    """Open the training data of these stages once, so that unusable data is refused before the first step.

    Documents whose shards are missing are tokenized. Raises the errors of `open_stage_data`.
    """
    for stage in stages:
        open_stage_data(
            data,
            mix=stage.mix,
            seq_len=stage.seq_len,
            sequences=stage.steps * stage.batch,
            tokenizer=tokenizer,
            seed=seed,
            split="train",
            cache=cache,
            stage=stage.name,
            vocab_size=vocab_size,
            workers=workers,
        )


def _texts(data: DataConfig, mix: Mix) -> list[str]:
    """Return the sources of a mix that have files."""
    return [name for name, entry in mix.items() if entry.weight > 0 and data.sources[name].kind != "synth"]


def _haystacks(data: DataConfig, mix: Mix) -> list[str]:
    """Return the sources that a mix's synth sources take their haystacks from."""
    return [str(data.sources[n].haystack) for n, e in mix.items() if e.weight > 0 and data.sources[n].kind == "synth"]


def _held_out_mix(data: DataConfig, mix: Mix, corpora: Mapping[str, Corpus], *, seq_len: int, stage: str) -> Mix:
    """Adapt a mix to its held-out documents, with a warning for each change.

    Sources without held-out documents are left out. A source whose held-out documents are shorter than its length
    policy needs gets the policy natural.
    """
    kept: Mix = {}
    missing: list[Corpus] = []
    for name, entry in mix.items():
        if entry.weight <= 0:
            continue
        corpus = corpora[data.sources[name].haystack or name]
        if corpus.total <= (_MIN_HAYSTACK if data.sources[name].kind == "synth" else 0):
            missing.append(corpus)
            continue
        wanted = longest_wanted(entry.length, seq_len)
        if wanted > int(corpus.lengths.max()):
            remark(
                f"stage {stage}: no held-out document of source {name} has {wanted:,} tokens, so the held-out loss "
                "reads them with natural lengths; raise data.heldout to hold out longer ones"
            )
            entry = replace(entry, length=LengthPolicy(kind="natural"))
        kept[name] = entry
    if missing:
        names = ", ".join(dict.fromkeys(corpus.name for corpus in missing))
        what = "lacks a part of its mix" if kept else "is not measured"
        remark(
            f"stage {stage}: the held-out loss {what}, since too few documents are held out of {names}; "
            f"{missing[0].hold_out_more(data.heldout)}, or set evaluate.heldout_sequences=0"
        )
    return kept


def choose_mix(data: DataConfig, mix: str, stage: str = "", *, key: str | None = None) -> Mix:
    """Return the mix that a stage names. Raises UserError, with the nearest known name, when it is unknown.

    key: the config key that holds the name, if it is not the stage's.
    """
    if mix not in data.mixes:
        near = nearest(mix, data.mixes)
        hint = f"did you mean {near!r}?" if near else f"known: {', '.join(data.mixes)}."
        raise UserError(
            f"{key or f'curriculum.stages.{stage}.mix'}={mix} is not one of data.mixes; {hint} Name one of them there, "
            f"or add data.mixes.{mix} (configs/data)"
        )
    return data.mixes[mix]


def open_source(
    name: str,
    data: DataConfig,
    tokenizer: Any,
    cache: Path,
    *,
    split: Split | Whole,
    workers: int | None = None,
    report: Any = None,
) -> Corpus:
    """Return a source's documents of one split, or all; missing shards are tokenized, and skipped records warned of."""

    def forward(done: int, total: int) -> None:
        report(name, done, total)

    folders, fresh = build_source(name, data, tokenizer, cache, workers=workers, report=forward if report else None)
    corpus = Corpus(name, data.sources[name], folders, split=split, heldout=data.heldout)
    everything = sum(shard.meta["documents"] for shard in corpus.shards)
    check_tally(name, corpus.tally, data.max_bad, documents=everything)
    told = describe_tally(name, corpus.tally, corpus.source) if fresh else None  # once, not at every start by all ranks
    if told:
        warn(told)
    return corpus


def check_vocabulary(largest: int, vocab_size: int) -> None:
    """Raise UserError when a token id has no row in the model's embedding."""
    if largest >= vocab_size:
        raise UserError(
            f"the tokenizer gives ids up to {largest} and the model has vocab_size={vocab_size}; use the model's own "
            "tokenizer, or resize its embeddings first (model.path)"
        )
