"""`longctx preflight`: what the nodes of a run look like before anything is trained.

The ranks meet as those of a run do, which checks their order, versions and command lines. Then they compare clocks,
look for one file in the shared folder, and time an all-reduce and one ring hop inside and between nodes.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longctx import console
from longctx.config.preflight import PreflightConfig
from longctx.distributed.placement import check_even

if TYPE_CHECKING:
    from longctx.distributed.ranks import Ranks

ENOUGH = 0.5  # share of the expected bandwidth below which a link is marked
REPEATS = 3
FOLDER_SECONDS = 15.0  # a network file system may show a new file late


def run(config: PreflightConfig) -> int:
    """Print what was found; returns 0, or 1 where something would keep a run from working."""
    from longctx.distributed import ranks as worlds

    ranks = worlds.start(config.device, 300.0, meeting_seconds=60 * config.meeting_minutes, key="device")
    if not ranks.first:
        console.silence()
    check_even(ranks.places)
    found = report(config, ranks)
    if ranks.first:
        if config.format == "json":
            console.emit_json(found)
        else:
            _show(found)
    return 1 if found["problems"] else 0


def report(config: PreflightConfig, ranks: Ranks) -> dict[str, Any]:
    """Return the nodes, the links and the problems found, on every rank; a collective.

    nodes: per node its name, ranks, devices and clock (seconds ahead of the first node's). links: per link the GB/s
    found (of the slowest rank) and expected. problems: one paragraph each.
    """
    nodes = _nodes(ranks)
    problems = _check_clocks(nodes, config.clock_seconds) + _check_folder(Path(config.folder), nodes, ranks)
    return {"nodes": nodes, "links": _links(config, ranks), "problems": problems}


def _nodes(ranks: Ranks) -> list[dict[str, Any]]:
    import torch

    name = torch.cuda.get_device_name(ranks.device) if ranks.device.type == "cuda" else "cpu"
    ranks.sum([0.0])  # all ranks leave it within milliseconds
    answers = ranks.gather((name, time.time(), len(os.sched_getaffinity(0))))
    names, width = ranks.nodes or ["this machine"], ranks.local_world
    return [
        {
            "node": node, "ranks": list(range(first, first + width)),
            "devices": [answer[0] for answer in answers[first : first + width]],
            "clock_seconds": round(answers[first][1] - answers[0][1], 2),
        }
        for node, first in zip(names, range(0, ranks.world, width), strict=True)
    ]  # fmt: skip


def _check_clocks(nodes: Sequence[dict[str, Any]], limit: float) -> list[str]:
    return [
        f"the clock of {node['node']} differs from that of {nodes[0]['node']} by {node['clock_seconds']:+.1f} s, and "
        f"clock_seconds={limit:g} are allowed: the times of metrics and files disagree; synchronize the nodes' clocks "
        "(chrony, ntp)"
        for node in nodes
        if abs(node["clock_seconds"]) > limit
    ]


def _check_folder(folder: Path, nodes: Sequence[dict[str, Any]], ranks: Ranks) -> list[str]:
    """Look on every node for a file that rank 0 writes into the folder."""
    mark, problem = folder / f".preflight-{ranks.broadcast(uuid.uuid4().hex)}", None
    first = nodes[0]["node"]
    if ranks.first:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            mark.write_text("longctx preflight\n", encoding="utf-8")
        except OSError as error:
            problem = f"folder={folder} cannot be written on {first}: {error.strerror}; choose another folder="
    if problem := ranks.broadcast(problem):
        return [problem]
    end = time.monotonic() + FOLDER_SECONDS
    while not (seen := mark.exists()) and time.monotonic() < end and ranks.local_rank == 0:
        time.sleep(0.5)
    answers = ranks.gather(seen)
    if ranks.first:
        mark.unlink(missing_ok=True)
    return [
        f"folder={folder} on {node['node']} does not show the file that {first} wrote into it, so the nodes do not "
        "share it: checkpoints and data must lie on a file system that every node sees; choose another folder="
        for node in nodes
        if not answers[node["ranks"][0]]
    ]


def _links(config: PreflightConfig, ranks: Ranks) -> list[dict[str, Any]]:
    """The bandwidth of an all-reduce and of one hop of each ring level, of the slowest rank."""
    import torch
    import torch.distributed as dist

    world, width = ranks.world, ranks.local_world
    if world == 1:
        return []
    several, hardware = world > width, config.hardware
    size = max(1, int(config.mbytes * 1e6 / 4))
    send, receive = (torch.ones(size, device=ranks.device) for _ in range(2))
    node, local = divmod(ranks.rank, width)

    def hop(to: int, source: int) -> Callable[[], None]:
        def body() -> None:
            pair = [dist.P2POp(dist.irecv, receive, source), dist.P2POp(dist.isend, send, to)]
            for work in dist.batch_isend_irecv(pair):
                work.wait()

        return body

    first = node * width
    inner = hop(first + (local + 1) % width, first + (local - 1) % width)
    outer = hop((ranks.rank + width) % world, (ranks.rank - width) % world)
    slowest = hardware.outer_gbytes if several else hardware.inner_gbytes
    tests: list[tuple[str, Callable[[], Any], float, float]] = [
        ("all-reduce over all ranks", lambda: dist.all_reduce(receive), 2 * (world - 1) / world, slowest)
    ]
    if width > 1:
        tests.append(("ring hop inside a node", inner, 1.0, hardware.inner_gbytes))
    if several:
        tests.append(("ring hop between nodes", outer, 1.0, hardware.outer_gbytes))
    return [
        {"link": name, "gbytes": share * 4 * size / _seconds(body, ranks) / 1e9, "expected": expected}
        for name, body, share, expected in tests
    ]


def _seconds(body: Callable[[], Any], ranks: Ranks) -> float:
    """The seconds of one call on the slowest rank, after a first call that sets connections up."""
    import torch

    def done() -> float:
        if ranks.device.type == "cuda":
            torch.cuda.synchronize(ranks.device)
        return time.perf_counter()

    body()
    ranks.sum([0.0])
    began = done()
    for _ in range(REPEATS):
        body()
    return max(ranks.gather((done() - began) / REPEATS))


def _show(found: dict[str, Any]) -> None:
    from rich.table import Table

    nodes = Table("node", "ranks", "devices", "clock")
    for node in found["nodes"]:
        numbers, devices = node["ranks"], list(dict.fromkeys(node["devices"]))
        nodes.add_row(
            node["node"], f"{numbers[0]} to {numbers[-1]}", f"{len(numbers)} x {', '.join(devices)}",
            f"{node['clock_seconds']:+.2f} s",
        )  # fmt: skip
    console.emit(nodes)
    if found["links"]:
        links = Table("link", "GB/s found", "GB/s expected", "")
        for link in found["links"]:
            mark = "!" if link["gbytes"] < ENOUGH * link["expected"] else ""
            links.add_row(link["link"], f"{link['gbytes']:.2f}", f"{link['expected']:g}", mark)
        console.emit(links)
    for problem in found["problems"]:
        console.warn(problem)
