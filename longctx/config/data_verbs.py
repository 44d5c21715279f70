"""Config schemas of `longctx data`, `data stats`, `data synth` and `bench data`.

The first two take everything `longctx train` takes, so that the data of a training command is prepared or
looked at by changing its verb.
"""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Literal, get_args

from pydantic import Field

from longctx.config.base import Count, Format, Given, Length, PerMachine, Positive, Seed, Window, schema
from longctx.config.data import DataConfig, SynthTask
from longctx.config.model import ModelConfig
from longctx.config.train import TrainConfig

Part = Literal["tokenize", "pack", "read", "million"]


@schema
class PrepareConfig(TrainConfig):
    """The root of configs/data.yaml: everything a training command says, and how its data is prepared."""

    workers: PerMachine | None = None  #: processes that tokenize; null: one per core
    cache: str = ""  #: folder of the shards; empty: RUN/data, where training looks
    format: Format = "text"  #: format of what is printed

    @property
    def shards(self) -> str:
        return self.cache or f"{self.folder}/data"


@schema
class StatsConfig(PrepareConfig):
    """The root of configs/data_stats.yaml."""

    png: str = ""  #: file for the picture; empty: RUN/data_stats.png


@schema
class SynthesizeConfig:
    """Documents of one task as .jsonl: text, tokens and the answers' places."""

    model: ModelConfig
    data: DataConfig
    task: SynthTask = SynthTask()
    haystack: str = "stdlib"  #: the source of data whose documents hide the needles
    #: tokens of a document, exactly; its field text has no marks, so read as data it is longer by data.eos
    length: Length = 8192
    count: Positive = 10  #: number of documents
    #: keys of the needles; eval: from the tenth that training never sees, in held-out text
    keys: Literal["train", "eval"] = "eval"
    seed: Seed = 0  #: random seed of keys, values and haystacks
    out: Given = "runs/synth.jsonl"  #: the file of documents
    cache: Given = "runs/synth/data"  #: folder of tokenized text
    format: Format = "text"  #: format of what is printed

    def __post_init__(self) -> None:
        if self.haystack not in self.data.sources or self.data.sources[self.haystack].kind == "synth":
            texts = [name for name, source in self.data.sources.items() if source.kind != "synth"]
            raise ValueError(f"haystack={self.haystack} is not a source of text; known: {', '.join(texts)}")


@schema
class BenchDataConfig:
    """Tokenizing, packing and reading, each timed."""

    model: ModelConfig
    documents: Annotated[Count, Field(ge=1000, le=10**9)] = 10_000_000  #: documents that are packed
    #: lengths that documents are packed to
    seq_lens: Annotated[list[Window], Field(min_length=1)] = field(default_factory=lambda: [2**16, 2**20])
    #: parts that are timed
    parts: Annotated[list[Part], Field(min_length=1)] = field(default_factory=lambda: list(get_args(Part)))
    megabytes: Positive = 60  #: MB of text to tokenize; workers take a second to start
    workers: PerMachine | None = None  #: processes that tokenize; null: one per core
    seed: Seed = 0  #: random seed of the drawn documents
    out: str = ""  #: a file for the figures
    format: Format = "text"  #: format of what is printed
