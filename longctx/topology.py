"""Where the ranks of a context-parallel group sit: M nodes of W ranks, and what their links carry.

Ranks are numbered node-major (rank = node * W + local), as torchrun and Slurm's block distribution do, so
that "inside a node" is integer arithmetic. The numbers come from the launcher's environment, a YAML file, or
the user.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
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
    """M `nodes` of W `ranks` each; `inner` and `outer` describe a rank's links, where known."""

    nodes: int = 1
    ranks: int = 1
    inner: Link | None = None
    outer: Link | None = None

    def __post_init__(self) -> None:
        if self.nodes < 1 or self.ranks < 1:
            raise ValueError(f"nodes={self.nodes}, ranks={self.ranks}: both must be at least 1")

    @property
    def size(self) -> int:
        return self.nodes * self.ranks

    def node_of(self, rank: int) -> int:
        return rank // self.ranks

    def local_of(self, rank: int) -> int:
        return rank % self.ranks

    def level(self, a: int, b: int) -> Level:
        """The link level a message from rank `a` to rank `b` travels over."""
        return "inner" if self.node_of(a) == self.node_of(b) else "outer"

    def link(self, level: Level) -> Link | None:
        return self.inner if level == "inner" else self.outer


def split(world_size: int, nodes: int) -> Topology:
    """N ranks over `nodes` nodes of equal size; ValueError when N is not a product."""
    if nodes < 1 or world_size % nodes:
        raise ValueError(f"nodes={nodes} does not divide the {world_size} ranks: N must be nodes * ranks per node")
    return Topology(nodes, world_size // nodes)


def from_environment(environment: Mapping[str, str]) -> Topology:
    """Read torchrun's (WORLD_SIZE, LOCAL_WORLD_SIZE) or Slurm's variables; one rank when neither is set."""
    if "WORLD_SIZE" in environment:
        world = int(environment["WORLD_SIZE"])
        local = int(environment.get("LOCAL_WORLD_SIZE", world))
        if world % local:
            raise ValueError(f"WORLD_SIZE={world} is not a multiple of LOCAL_WORLD_SIZE={local}")
        return Topology(world // local, local)
    if "SLURM_NTASKS" in environment:
        return split(int(environment["SLURM_NTASKS"]), int(environment.get("SLURM_NNODES", "1")))
    return Topology()


def from_file(path: str | Path) -> Topology:
    """Read {nodes, ranks, inner: {bandwidth, latency}, outer: {...}} from YAML; unknown keys are refused."""
    import yaml

    data = yaml.safe_load(Path(path).read_text()) or {}
    unknown = set(data) - {"nodes", "ranks", "inner", "outer"}
    if unknown:
        raise ValueError(f"{path}: unknown keys {sorted(unknown)}; known: nodes, ranks, inner, outer")
    links = {
        name: Link(**{key: float(value) for key, value in data[name].items()})
        for name in ("inner", "outer")
        if data.get(name)
    }
    return Topology(int(data.get("nodes", 1)), int(data.get("ranks", 1)), **links)
