"""Config schemas of `longctx bench attention` and `longctx bench hierarchy`.

The defaults are the settings whose figures are in docs/benchmarks.md.
"""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Literal, get_args

from pydantic import Field

from longctx.config.base import AsDtype, Format, Length, PerMachine, Positive, Seconds, Text, Width, schema

Schedule = Literal["flat_ring", "double_ring", "allgather_ring", "ulysses_ring"]
Few = Annotated[Positive, Field(le=99)]


@schema
class BenchAttentionConfig:
    """One ring of single-thread ranks beside SDPA (CPU), virtual ranks beside the bare kernel (GPU), or two rings."""

    lengths: list[Length] = field(default_factory=lambda: [8192, 16384])  #: tokens of the whole sequence
    heads: Width = 8  #: query heads
    kv_heads: Width = 2  #: key and value heads
    head_dim: Width = 64  #: width of a head
    batch: Positive = 1  #: sequences of a call
    device: Literal["auto", "cpu", "cuda"] = "auto"  #: device that is measured; auto: a GPU where there is one
    #: compared with: the device's own attention, or the zigzag ring of the package ring_flash_attn on the same ranks
    #: and kernel
    beside: Literal["device", "ring_flash_attn"] = "device"
    #: dtype of the tensors; auto: float32 on a CPU, bfloat16 on a GPU and beside ring_flash_attn
    dtype: Annotated[Literal["auto", "float32", "bfloat16"], AsDtype] = "auto"
    #: CPU: ranks of the ring, and SDPA's threads; beside ring_flash_attn: ranks of both rings, which may share a GPU
    ranks: PerMachine = 2
    #: GPU: numbers of virtual ranks, a case for each
    virtual_ranks: Annotated[list[PerMachine], Field(min_length=1)] = field(default_factory=lambda: [1, 2, 4, 8])
    #: GPU: packed cases, each with so many documents of uneven lengths, for kernels that take many in one call
    documents: list[Annotated[Positive, Field(ge=2)]] = field(default_factory=lambda: [64, 512])
    #: GPU: kernels by name; []: all that can serve, beside ring_flash_attn flash_attn_2 and the first that can serve
    backends: list[Text] = field(default_factory=list)
    repeats: Positive = 5  #: timed calls; the median counts
    out: str = ""  #: a folder for attention.json; empty: none
    format: Format = "text"  #: format of what is printed

    def __post_init__(self) -> None:
        _groups(self.heads, self.kv_heads)
        if not self.lengths:
            raise ValueError("lengths=[] names no length to measure; write lengths=[8192,16384]")
        for length in self.lengths:
            if length <= max(self.documents, default=0):
                raise ValueError(f"documents: {max(self.documents)} do not fit into lengths: {length} tokens")
            if length < 2 * self.ranks:
                raise ValueError(
                    f"lengths: {length} is shorter than 2 x ranks={2 * self.ranks}; zigzag needs that much"
                )
            if length % (2 * self.ranks):
                raise ValueError(
                    f"lengths: {length} is not divisible by 2 x ranks = {2 * self.ranks}; take "
                    f"{length - length % (2 * self.ranks)}, or another number of ranks"
                )


@schema
class BenchHierarchyConfig:
    """Every schedule in turn on nodes x ranks behind slow links, each beside the link model's prediction."""

    nodes: Few = 4  #: virtual nodes, one network namespace each
    ranks: Few = 4  #: ranks of each node
    rate: Text = "10mbit"  #: what one rank's own link carries, as tc writes it: 10mbit, 1gbit
    seq_len: Length = 4096  #: tokens of the whole sequence
    heads: Width = 8  #: query heads
    kv_heads: Width = 8  #: key and value heads
    head_dim: Width = 64  #: width of a head
    schedules: list[Schedule] = field(default_factory=lambda: list(get_args(Schedule)))  #: schedules that are measured
    ulysses: PerMachine | None = None  #: ranks that trade heads under ulysses_ring; null: all of a node
    repeats: Positive = 3  #: timed calls of each schedule; the median counts
    flat_repeats: Positive | None = None  #: timed calls of the flat ring, which takes longest; null: as repeats
    backward: bool = True  #: whether the backward pass is timed too
    unlimited: bool = True  #: also measure without limits, from which the prediction starts
    timeout_seconds: Seconds = 900.0  #: seconds that one schedule may take
    out: str = "runs/bench-hierarchy"  #: folder for hierarchy.json and hierarchy.png
    format: Format = "text"  #: format of what is printed

    def __post_init__(self) -> None:
        _groups(self.heads, self.kv_heads)
        if not self.schedules:
            raise ValueError("schedules=[] names nothing to measure; write schedules=[flat_ring,double_ring]")
        if self.seq_len % (2 * self.nodes * self.ranks):
            raise ValueError(
                f"seq_len={self.seq_len} is not divisible by 2 x nodes x ranks = {2 * self.nodes * self.ranks}"
            )
        if self.ulysses is not None and (self.nodes * self.ranks) % self.ulysses:
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


def _groups(heads: int, kv_heads: int) -> None:
    if heads % kv_heads:
        raise ValueError(f"heads={heads} is not a multiple of kv_heads={kv_heads}")
