"""What `longctx bench attention` and `longctx bench hierarchy` can be told.

The defaults are the settings whose figures stand in docs/benchmarks.md.
"""

from __future__ import annotations

from dataclasses import field
from typing import Literal

from longctx.config.base import Format, Length, Text, schema

Schedule = Literal["flat_ring", "double_ring", "allgather_ring", "ulysses_ring"]


@schema
class BenchAttentionConfig:
    """One ring of two single-thread ranks beside SDPA (CPU), or virtual ranks beside the bare kernel (GPU).

    lengths: tokens of the whole sequence. virtual_ranks and backends apply to a GPU only; backends=[]
    takes every one the device can serve. out: a folder for attention.json; empty writes nothing.
    """

    lengths: list[Length] = field(default_factory=lambda: [8192, 16384])
    heads: int = 8
    kv_heads: int = 2
    head_dim: int = 64
    batch: int = 1
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    ranks: int = 2
    virtual_ranks: list[int] = field(default_factory=lambda: [1, 2, 4, 8])
    backends: list[Text] = field(default_factory=list)
    repeats: int = 5
    out: str = ""
    format: Format = "text"

    def __post_init__(self) -> None:
        _positive(self, "heads", "kv_heads", "head_dim", "batch", "ranks", "repeats")
        _groups(self.heads, self.kv_heads)
        if not self.lengths:
            raise ValueError("lengths=[] names no length to measure; write lengths=[8192,16384]")
        for length in self.lengths:
            if length < 2 * self.ranks:
                raise ValueError(
                    f"lengths: {length} is shorter than 2 x ranks={2 * self.ranks}; zigzag needs that much"
                )


@schema
class BenchHierarchyConfig:
    """Every schedule in turn on nodes x ranks behind links of `rate`, each beside the link model's
    prediction.

    rate: what one rank's own link carries, as tc writes it (10mbit, 1gbit). unlimited: also measure without
    limits, which the prediction starts from. flat_repeats: the flat ring takes longest; null repeats it as
    often as the others. ulysses: ranks per Ulysses group of the 2D schedule; null takes all of a node.
    out: a folder for hierarchy.json and hierarchy.png.
    """

    nodes: int = 4
    ranks: int = 4
    rate: Text = "10mbit"
    tokens: Length = 4096
    heads: int = 8
    kv_heads: int = 8
    head_dim: int = 64
    schedules: list[Schedule] = field(
        default_factory=lambda: ["flat_ring", "double_ring", "allgather_ring", "ulysses_ring"]
    )
    ulysses: int | None = None
    repeats: int = 3
    flat_repeats: int | None = None
    backward: bool = True
    unlimited: bool = True
    timeout_seconds: float = 900.0
    out: str = "runs/bench-hierarchy"
    format: Format = "text"

    def __post_init__(self) -> None:
        _positive(self, "nodes", "ranks", "heads", "kv_heads", "head_dim", "repeats")
        _groups(self.heads, self.kv_heads)
        if self.flat_repeats is not None:
            _positive(self, "flat_repeats")
        if not self.schedules:
            raise ValueError("schedules=[] names nothing to measure; write schedules=[flat_ring,double_ring]")
        if self.nodes > 99 or self.ranks > 99:
            raise ValueError(f"nodes={self.nodes}, ranks={self.ranks}: at most 99 each on one machine")
        if self.tokens % (2 * self.nodes * self.ranks):
            raise ValueError(
                f"tokens={self.tokens} is not divisible by 2 x nodes x ranks = {2 * self.nodes * self.ranks}"
            )
        if self.ulysses is not None and (self.ulysses < 1 or (self.nodes * self.ranks) % self.ulysses):
            raise ValueError(f"ulysses={self.ulysses} does not divide nodes x ranks = {self.nodes * self.ranks}")
        bits_per_second(self.rate)

    @property
    def bytes_per_second(self) -> float:
        """The rate of one link in bytes per second, headers included."""
        return bits_per_second(self.rate) / 8


def bits_per_second(rate: str) -> float:
    """A rate as tc writes it: `10mbit` is 1e7; ValueError for anything else."""
    for unit, factor in (("kbit", 1e3), ("mbit", 1e6), ("gbit", 1e9)):
        if rate.lower().endswith(unit):
            try:
                number = float(rate[: -len(unit)])
            except ValueError:
                break
            if number > 0:
                return number * factor
    raise ValueError(f"rate={rate!r} is not a rate; write it as tc does: 10mbit, 50mbit, 1gbit")


def _positive(config: object, *names: str) -> None:
    for name in names:
        if getattr(config, name) < 1:
            raise ValueError(f"{name}={getattr(config, name)} must be 1 or more")


def _groups(heads: int, kv_heads: int) -> None:
    if heads % kv_heads:
        raise ValueError(f"heads={heads} is not a multiple of kv_heads={kv_heads}")
