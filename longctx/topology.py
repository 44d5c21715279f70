"""Where the ranks of a context-parallel group sit: M nodes of W ranks, and what their links carry.

Ranks are numbered node-major (rank = node * W + local), as torchrun and Slurm's block distribution do, so
that "inside a node" is integer arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Level = Literal["inner", "outer"]


@dataclass(frozen=True)
class Link:
    """One direction of a link: `bandwidth` in bytes per second, `latency` in seconds."""

    bandwidth: float
    latency: float = 0.0

    def __post_init__(self) -> None:
        if self.bandwidth <= 0 or self.latency < 0:
            raise ValueError(f"link bandwidth={self.bandwidth}, latency={self.latency}: bandwidth > 0 and latency >= 0")


@dataclass(frozen=True)
class Topology:
    """M `nodes` of W `ranks` each."""

    nodes: int = 1
    ranks: int = 1

    def __post_init__(self) -> None:
        if self.nodes < 1 or self.ranks < 1:
            raise ValueError(f"nodes={self.nodes}, ranks={self.ranks}: both must be at least 1")

    @property
    def size(self) -> int:
        return self.nodes * self.ranks

    def node_of(self, rank: int) -> int:
        return rank // self.ranks

    def level(self, a: int, b: int) -> Level:
        """The link level a message from rank `a` to rank `b` travels over."""
        return "inner" if self.node_of(a) == self.node_of(b) else "outer"


def split(world_size: int, nodes: int) -> Topology:
    """N ranks over `nodes` nodes of equal size; ValueError when N is not a product."""
    if nodes < 1 or world_size % nodes:
        raise ValueError(f"nodes={nodes} does not divide the {world_size} ranks: N must be nodes * ranks per node")
    return Topology(nodes, world_size // nodes)
