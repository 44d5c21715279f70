"""What `longctx data`, `data stats`, `data synth` and `bench data` can be told.

The first two take everything `longctx train` takes, so that the data of a training command is prepared or
looked at by changing its verb.
"""

from __future__ import annotations

from typing import Literal

from longctx.config.base import Count, Format, Length, Text, schema
from longctx.config.data import DataConfig, SynthTask
from longctx.config.model import ModelConfig
from longctx.config.train import TrainConfig


@schema
class PrepareConfig(TrainConfig):
    """workers: processes that tokenize (None: one per core); cache: where shards are kept (empty: RUN/data,
    where training looks for them)."""

    workers: int | None = None
    cache: str = ""
    format: Format = "text"

    @property
    def shards(self) -> str:
        return self.cache or f"{self.folder}/data"


@schema
class StatsConfig(PrepareConfig):
    """png: where the picture goes (empty: RUN/data_stats.png)."""

    png: str = ""


@schema
class SynthesizeConfig:
    """Documents of one task as .jsonl: text, tokens and the answers' places.

    haystack: the source of data whose documents hide the needles; keys: `eval` draws from the tenth that
    training never sees, over held-out documents.
    """

    model: ModelConfig
    data: DataConfig
    task: SynthTask = SynthTask()
    haystack: str = "stdlib"
    length: Length = 8192
    count: int = 10
    keys: Literal["train", "eval"] = "eval"
    seed: int = 0
    out: Text = "runs/synth.jsonl"
    cache: str = "runs/synth/data"
    format: Format = "text"

    def __post_init__(self) -> None:
        if self.count < 1 or self.length < 1:
            raise ValueError(f"count={self.count} and length={self.length} must be 1 or more")
        if self.haystack not in self.data.sources or self.data.sources[self.haystack].kind == "synth":
            texts = [name for name, source in self.data.sources.items() if source.kind != "synth"]
            raise ValueError(f"haystack={self.haystack} is not a source of text; known: {', '.join(texts)}")


@schema
class BenchDataConfig:
    """documents: of the packed index; seq_lens: it is packed to; parts: what to measure."""

    model: ModelConfig
    documents: Count = 10_000_000
    seq_lens: list[Length]
    parts: list[Literal["tokenize", "pack", "read", "million"]]
    megabytes: int = 60
    workers: int | None = None
    seed: int = 0
    out: str = ""
    format: Format = "text"
