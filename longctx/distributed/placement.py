"""Which rank is on which node: the order of ranks, whether nodes are even, and each rank's share of a node's cores.

Ranks introduce themselves to each other (`longctx.distributed.meeting`). This module is arithmetic on what they say.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field

from longctx.errors import UserError


@dataclass(frozen=True)
class Introduction:
    """What a rank says of itself.

    node: the node's name. local_world: the ranks of its node by its launcher, None where that says nothing. cpus: the
    cores it may use, a bit each. command: the words of its command line, None where they need not be compared.
    """

    rank: int
    node: str
    local_rank: int
    local_world: int | None
    cpus: int = 0
    versions: dict[str, str] = field(default_factory=dict)
    command: list[str] | None = None

    def written(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def read(cls, text: str | bytes) -> Introduction:
        return cls(**json.loads(text))


def place(ranks: Sequence[Introduction]) -> list[Introduction]:
    """Order the ranks node by node, in the order of each node's first rank, and within a node by local rank.

    Raises UserError where versions or command lines differ, or where a launcher contradicts what the ranks say.
    """
    _check_same(ranks)
    nodes = by_node(ranks)
    for node, own in nodes.items():
        locals_ = sorted(one.local_rank for one in own)
        said = {one.local_world for one in own if one.local_world is not None}
        if len(set(locals_)) < len(own) or (said and said != {len(own)}):
            raise UserError(
                f"{len(own)} ranks are on {node} ({listed([one.rank for one in own])}), and their launcher says "
                f"LOCAL_WORLD_SIZE={', '.join(map(str, sorted(said))) or 'nothing'} and LOCAL_RANK="
                f"{', '.join(map(str, locals_))}: ranks of one node need different local ranks, of which there are as "
                "many as LOCAL_WORLD_SIZE says (docs/training.md)"
            )
    return [one for own in nodes.values() for one in sorted(own, key=lambda one: one.local_rank)]


def by_node(ranks: Sequence[Introduction]) -> dict[str, list[Introduction]]:
    """The ranks of each node, in the order of the nodes' first ranks."""
    nodes: dict[str, list[Introduction]] = {}
    for one in ranks:
        nodes.setdefault(one.node, []).append(one)
    return nodes


def check_even(ranks: Sequence[Introduction]) -> None:
    """Raise UserError unless every node has as many ranks as the others."""
    counts = {node: len(own) for node, own in by_node(ranks).items()}
    if len(set(counts.values())) > 1:
        shown = ", ".join(f"{node} has {count}" for node, count in counts.items())
        raise UserError(
            f"the nodes have different numbers of ranks ({shown}), and a ring over nodes of different sizes would wait "
            "for the smallest; give every node the same (srun or sbatch --ntasks-per-node=N, GPUS=N for "
            "launch/torchrun.sh)"
        )


def cores(ranks: Sequence[Introduction], rank: int) -> int:
    """The cores that a rank may keep busy: of each core that it may use, its share among the ranks of its node.

    A launcher may have bound each rank to cores of its own, or may let all ranks of a node use all of its cores.
    """
    own = ranks[rank]
    masks = [one.cpus for one in ranks if one.node == own.node]
    mine = [core for core in range(own.cpus.bit_length()) if own.cpus >> core & 1]
    return max(1, int(1e-9 + sum(1 / sum(mask >> core & 1 for mask in masks) for core in mine)))


def listed(numbers: Sequence[int]) -> str:
    """Rank numbers in words: "ranks 0 to 3", "rank 2", "ranks 0, 2 and 5"."""
    numbers = sorted(numbers)
    if len(numbers) == 1:
        return f"rank {numbers[0]}"
    if len(numbers) > 2 and numbers == list(range(numbers[0], numbers[-1] + 1)):
        return f"ranks {numbers[0]} to {numbers[-1]}"
    return f"ranks {', '.join(map(str, numbers[:-1]))} and {numbers[-1]}" if numbers else "none"


def _check_same(ranks: Sequence[Introduction]) -> None:
    first = ranks[0]
    for one in ranks:
        for name, version in one.versions.items():
            if first.versions.get(name) != version:
                raise UserError(
                    f"rank {one.rank} on {one.node} runs {name} {version}, and rank {first.rank} on {first.node} runs "
                    f"{name} {first.versions.get(name)}; install the same versions on every node"
                )
        if one.command != first.command:
            theirs, ours = one.command or [], first.command or []
            only = [word for word in theirs if word not in ours][:3] or ["(nothing of its own)"]
            lacks = [word for word in ours if word not in theirs][:3]
            raise UserError(
                f"rank {one.rank} on {one.node} was started with another command line than rank {first.rank} on "
                f"{first.node}: it has {' '.join(only)}" + (f" and lacks {' '.join(lacks)}" if lacks else "")
                + "; run the same command on every node, and give another run another port"
            )  # fmt: skip
