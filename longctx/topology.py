"""The topology of a context-parallel group: M nodes of W ranks each, and the links between them.

Ranks are numbered node by node (rank = node * W + local), as torchrun and Slurm's block distribution number them, so
integer arithmetic tells whether two ranks share a node.
"""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral
from typing import Literal

Level = Literal["inner", "outer"]


@dataclass(frozen=True)
class Link:
    """One direction of a link, with its `bandwidth` in bytes per second and its `latency` in seconds."""

    bandwidth: float
    latency: float = 0.0

    def __post_init__(self) -> None:
        if self.bandwidth <= 0 or self.latency < 0:
            raise ValueError(f"link bandwidth={self.bandwidth}, latency={self.latency}: bandwidth > 0 and latency >= 0")


@dataclass(frozen=True)
class Topology:
    """A group of M `nodes` with W `ranks` on each."""

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
        """The level of the link that carries a message from rank `a` to rank `b`."""
        return "inner" if self.node_of(a) == self.node_of(b) else "outer"


def is_whole(value: object) -> bool:
    """Whether an argument is a whole number; true and false are not."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def split(world_size: int, nodes: int) -> Topology:
    """Put N ranks on `nodes` nodes of equal size; raises ValueError unless `nodes` divides N."""
    if not is_whole(nodes) or nodes < 1 or world_size % nodes:
        raise ValueError(f"nodes={nodes} does not divide the {world_size} ranks: N must be nodes * ranks per node")
    return Topology(nodes, world_size // nodes)
