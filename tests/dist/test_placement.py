"""Placement of ranks: order node by node, even nodes, contradictions, versions, command lines, shares of cores."""

from __future__ import annotations

from dataclasses import replace

import pytest

from longctx.decide import Decision, Machines, ring_words
from longctx.distributed.placement import Introduction, check_even, cores, listed, place
from longctx.errors import UserError


def ranks(nodes: str) -> list[Introduction]:
    """The facts of ranks on nodes named by letters: "abab" is a cyclic placement of two ranks on each of two nodes."""
    return [Introduction(number, node, nodes[:number].count(node), None) for number, node in enumerate(nodes)]


@pytest.mark.parametrize(
    ("nodes", "order"),
    [("aabb", [0, 1, 2, 3]), ("abab", [0, 2, 1, 3]), ("abcabc", [0, 3, 1, 4, 2, 5]), ("abb", [0, 1, 2]), ("a", [0])],
)
def test_ranks_are_numbered_node_by_node(nodes: str, order: list[int]) -> None:
    assert [one.rank for one in place(ranks(nodes))] == order


def test_the_ranks_of_a_node_follow_their_local_ranks() -> None:
    swapped = [replace(one, local_rank=1 - one.local_rank) for one in ranks("aabb")]
    assert [one.rank for one in place(swapped)] == [1, 0, 3, 2]


@pytest.mark.parametrize("nodes", ["aabc", "aab", "abbb"])
def test_nodes_of_different_sizes_are_told(nodes: str) -> None:
    with pytest.raises(UserError, match=rf"a has {nodes.count('a')}, b has {nodes.count('b')}"):
        check_even(ranks(nodes))
    check_even(ranks("abab"))


def test_a_launcher_that_contradicts_its_ranks_is_refused() -> None:
    both = [replace(one, local_world=1, local_rank=0) for one in ranks("aa")]
    with pytest.raises(UserError, match=r"2 ranks are on a \(ranks 0 and 1\).*LOCAL_WORLD_SIZE=1 and LOCAL_RANK=0, 0"):
        place(both)
    with pytest.raises(UserError, match="LOCAL_WORLD_SIZE=4"):
        place([replace(one, local_world=4) for one in ranks("aabb")])


def test_other_versions_and_command_lines_are_refused() -> None:
    old, new = {"longctx": "1", "torch": "2.13"}, {"longctx": "1", "torch": "2.14"}
    with pytest.raises(UserError, match=r"rank 1 on b runs torch 2\.14, and rank 0 on a runs torch 2\.13"):
        place([replace(one, versions=versions) for one, versions in zip(ranks("ab"), (old, new), strict=True)])
    words = (["model=tiny", "seed=1"], ["model=tiny", "seed=2"])
    with pytest.raises(UserError, match=r"rank 1 on b was started with another command line.*seed=2 and lacks seed=1"):
        place([replace(one, command=command) for one, command in zip(ranks("ab"), words, strict=True)])


@pytest.mark.parametrize(
    ("cpus", "shares"),
    [
        ([[0, 1, 2, 3]] * 2, [2, 2]),  # nobody bound the ranks
        ([[0, 1], [2, 3]], [2, 2]),  # task/affinity bound each to cores of its own
        ([[0, 1, 2, 3], [2, 3]], [3, 1]),
        ([[0]] * 4, [1, 1, 1, 1]),
    ],
)
def test_cores_are_not_divided_twice(cpus: list[list[int]], shares: list[int]) -> None:
    masks = [sum(1 << core for core in own) for own in cpus]
    there = [replace(one, cpus=mask) for one, mask in zip(ranks("a" * len(cpus)), masks, strict=True)]
    elsewhere = replace(ranks("ab")[1], cpus=masks[0])
    assert [cores([*there, elsewhere], number) for number in range(len(cpus))] == shares


def test_an_introduction_survives_the_store() -> None:
    one = Introduction(3, "a", 1, 2, 1 << 191, {"torch": "2"}, ["x=1"])
    assert Introduction.read(one.written()) == one


@pytest.mark.parametrize(
    ("numbers", "words"),
    [([2], "rank 2"), ([1, 0], "ranks 0 and 1"), ([3, 1, 2], "ranks 1 to 3"), ([0, 2], "ranks 0 and 2")],
)
def test_ranks_in_words(numbers: list[int], words: str) -> None:
    assert listed(numbers) == words


@pytest.mark.parametrize(
    ("decision", "machines", "words"),
    [
        (Decision(1, 4, 1, "flat_ring", 1, 1, 1), Machines(4, 2), "no ring"),
        (Decision(2, 2, 1, "flat_ring", 1, 1, 1), Machines(4, 2), "flat_ring of 2 ranks inside a node"),
        (Decision(4, 1, 1, "flat_ring", 1, 1, 1), Machines(4, 2), "flat_ring of 4 ranks between nodes"),
        (Decision(4, 3, 1, "flat_ring", 1, 1, 1), Machines(12, 6), "flat_ring of 4 ranks between nodes"),
        (
            Decision(4, 1, 2, "double_ring", 1, 1, 1), Machines(4, 2),
            "double_ring, inner ring of 2 ranks inside a node, outer ring of 2 between nodes",
        ),
        (
            Decision(4, 1, 2, "double_ring", 1, 1, 1), Machines(4, 1),
            "double_ring, inner ring of 2 ranks between nodes, outer ring of 2 between nodes",
        ),
        (
            Decision(4, 1, 2, "double_ring", 1, 1, 1), Machines(4, 4),
            "double_ring, inner ring of 2 ranks inside a node, outer ring of 2 inside a node",
        ),
    ],
)  # fmt: skip
def test_each_ring_is_told_with_its_link(decision: Decision, machines: Machines, words: str) -> None:
    assert ring_words(decision, machines) == words
