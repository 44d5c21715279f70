"""`longctx data stats`: the document lengths of each source, and how often a curriculum reads each source.

Every stage is packed as in training, so padding, cuts and epochs are those of the run.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from longctx.config.data import DataConfig
from longctx.config.data_verbs import StatsConfig
from longctx.console import emit, emit_json, remark, warn
from longctx.data.check import check_sources
from longctx.data.corpus import Corpus
from longctx.data.run import open_both, summary, text_sources
from longctx.data.stage_opening import choose_mix
from longctx.data.stage_packing import describe_padding, pack_stage
from longctx.data.tokenizer import load_tokenizer
from longctx.shape import shape_of_model


def run(config: StatsConfig) -> int:
    """Print tables or one JSON document, and draw the histogram of document lengths."""
    from longctx.curriculum import resolve
    from longctx.data.picture import draw_lengths
    from longctx.rope import rope_of_model

    rope = rope_of_model(config.model)
    stages = resolve(
        config.curriculum,
        head_dim=rope.head_dim,
        rope=rope.parameters,
        window=rope.window,
        file="configs/curriculum",
    )
    for stage in stages:
        choose_mix(config.data, stage.mix, stage.name)
    check_sources(config.data, text_sources(config.data), Path(config.shards))
    train, heldout = open_both(config, load_tokenizer(config.model, vocab_size=shape_of_model(config.model).vocab))
    lengths = {name: corpus.lengths for name, corpus in train.items()}
    seq_lens = {stage.name: stage.seq_len for stage in stages}
    document: dict[str, Any] = {
        "sources": {
            name: {**summary(train[name], heldout[name]), "at_least": at_least(lengths[name], seq_lens)}
            for name in train
        }
    }
    if config.format == "text":  # before packing, which refuses stages that these documents cannot fill
        emit(_documents(document, train, seq_lens))
    document["stages"] = stage_use(config.data, lengths, stages, config.seed)
    document["epochs"] = epochs(document["stages"], lengths)
    _warn_repeats(document, config.data.max_epochs)
    png = Path(config.png or f"{config.folder}/data_stats.png")
    draw_lengths(lengths, seq_lens, png)
    document["png"] = str(png)
    if config.format == "json":
        emit_json(document)
    else:
        emit(_stages(document))
        emit(f"picture: {png}")
    return 0


def at_least(lengths: np.ndarray, seq_lens: Mapping[str, int]) -> dict[str, dict[str, int]]:
    """Count, for each stage, the documents that are at least as long as its sequences, and their tokens."""
    found = {}
    for stage, seq_len in seq_lens.items():
        long = lengths[lengths >= seq_len]
        found[stage] = {"documents": len(long), "tokens": int(long.sum(dtype=np.int64))}
    return found


def stage_use(
    data: DataConfig, lengths: Mapping[str, np.ndarray], stages: Sequence[Any], seed: int
) -> dict[str, dict[str, Any]]:
    """Pack each stage as in training; returns its padding and, by source, tokens, documents, cuts and epochs.

    Warns of a stage of which more than a tenth is padding.
    """
    found: dict[str, dict[str, Any]] = {}
    for stage in stages:
        packing = pack_stage(
            data,
            choose_mix(data, stage.mix, stage.name),
            lengths,
            seq_len=stage.seq_len,
            sequences=stage.steps * stage.batch,
            seed=seed,
            stage=f"{stage.name}/train",
        )
        padded = describe_padding(data, stage.mix, packing, stage.name)
        if padded:
            remark(padded)
        found[stage.name] = {
            "mix": stage.mix,
            "seq_len": stage.seq_len,
            "sequences": len(packing),
            "padding": packing.padding,
            # The documents of a synth source are made anew, so that none is repeated.
            "sources": {
                name: asdict(use) | ({} if name in lengths else {"epochs": None}) for name, use in packing.use.items()
            },
        }
    return found


def epochs(stages: Mapping[str, dict[str, Any]], files: Collection[str]) -> dict[str, float]:
    """Add up the epochs of each source over the whole curriculum. files: the sources that have files to repeat."""
    total: dict[str, float] = {}
    for stage in stages.values():
        for name, use in stage["sources"].items():
            if name in files:
                total[name] = total.get(name, 0.0) + use["epochs"]
    return total


def _warn_repeats(document: Mapping[str, Any], most: float) -> None:
    for name, count in document["epochs"].items():
        if count > most:
            warn(
                f"source {name} will be read {count:.1f} times over the curriculum, more than "
                f"data.max_epochs={most:g}; add documents, or lower its weight in data.mixes"
            )


def _documents(document: Mapping[str, Any], train: Mapping[str, Corpus], seq_lens: Mapping[str, int]) -> Any:
    from rich.table import Table

    first = Table(box=None, pad_edge=False, header_style="bold", title="Documents", title_justify="left")
    for title in ("source", "documents", "tokens", "median", "longest"):
        first.add_column(title, justify="left" if title == "source" else "right")
    for stage, seq_len in seq_lens.items():
        first.add_column(f">= {seq_len:,} ({stage})", justify="right")
    for title in ("held-out documents", "held-out tokens"):
        first.add_column(title, justify="right")
    for name, row in document["sources"].items():
        median = int(np.median(train[name].lengths)) if len(train[name]) else 0
        cells = [f"{row[key]:,}" for key in ("documents", "tokens")]
        long = [f"{row['at_least'][stage]['documents']:,}" for stage in seq_lens]
        held = [f"{row[key]:,}" for key in ("heldout_documents", "heldout_tokens")]
        first.add_row(name, *cells, f"{median:,}", f"{row['longest']:,}", *long, *held)
    return first


def _stages(document: Mapping[str, Any]) -> Any:
    from rich.table import Table

    second = Table(box=None, pad_edge=False, header_style="bold", title="Stages", title_justify="left")
    for title in ("stage", "source", "tokens", "documents", "cuts", "epochs", "padding"):
        second.add_column(title, justify="left" if title in ("stage", "source") else "right")
    for stage, row in document["stages"].items():
        for name, use in row["sources"].items():
            second.add_row(
                stage,
                name,
                f"{use['tokens']:,}",
                f"{use['documents']:,}",
                f"{use['cuts']:,}",
                "-" if use["epochs"] is None else f"{use['epochs']:.2f}",
                f"{row['padding']:.2%}",
            )
    return second
