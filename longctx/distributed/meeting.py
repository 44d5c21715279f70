"""The meeting of ranks that several launchers' processes started: each says who and where it is, and rank 0 judges.

The ranks meet at a store that rank 0 serves at MASTER_ADDR:MASTER_PORT (under torchrun the launcher serves it). Rank 0
publishes a verdict: the ranks in their final order, or the reason why they cannot run together. A rank of another run
that comes to the same port is turned away and disturbs nobody. Ranks that are missing are named after a minute, by
those that are there. At the end the ranks leave together, rank 0 last, because a launcher ends all others as soon as
one leaves with a status.

The store's keys, R a rank's number:

| key | written by | holds |
|---|---|---|
| run | the first rank 0 | token, world and node of the run; a second rank 0 sees from it that it is one |
| claim/R | each process with number R | how many there are; the second refuses the run |
| here/R, here | rank R | its Introduction; how many have introduced themselves |
| verdict | rank 0, or who refuses first | the ranks in their final order, or the refusal with its status |
| status/R | rank R, leaving | its exit status |
| leave | rank 0, leaving | the run's status, which ranks that failed wait for |
| gone | the others, leaving | how many have left; rank 0 waits for all |
"""

from __future__ import annotations

import errno
import json
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

import longctx
from longctx.distributed.launcher import RUN_TOKEN, launcher_environment, node_name
from longctx.distributed.placement import Introduction, listed, place
from longctx.errors import RunFailed, UserError, first_line
from longctx.versions import installed

NEWS_SECONDS = 60.0  # after so long a meeting says who is missing
LEAVE_SECONDS = 10.0  # for the slowest rank to leave
SEVERITY = (1, 2, 130, 75)  # the first of these statuses that any rank has is the run's

_met: Meeting | None = None


class NotMet(RunFailed):
    """The ranks did not meet; one rank of each node says so, because rank 0 may be the one that is missing."""


@dataclass(frozen=True)
class Meeting:
    """A store at which ranks meet, and the ranks in their final order, none before the verdict."""

    store: dist.Store
    rank: int
    world: int
    ranks: Sequence[Introduction] = ()


@dataclass
class _Patience:
    """What a waiting rank does as time passes: it says something once, and gives up in the end."""

    seconds: float
    began: float
    silent: bool
    said: bool = False

    @property
    def news_seconds(self) -> float:
        return min(NEWS_SECONDS, self.seconds / 2)

    def waited(self) -> float:
        return time.monotonic() - self.began

    def tick(self, words: Callable[[], str], pause: float = 0.1) -> bool:
        """Sleep, and say words() when it is time; False when all patience is gone."""
        if self.waited() > self.seconds:
            return False
        if not self.said and self.waited() > self.news_seconds:
            self.said = True
            if not self.silent:
                print(
                    f"longctx: {words()} The run waits for {self.seconds - self.waited():.0f} s more "
                    "(launch.meeting_minutes)", file=sys.stderr, flush=True,
                )  # fmt: skip
        time.sleep(pause)
        return True


def meet(rank: int, world: int, *, seconds: float, command: Sequence[str] | None = None) -> Meeting:
    """Meet the other ranks and return their final order; this process's RANK and LOCAL_* variables follow it.

    seconds: how long to wait for missing ranks. command: the words of the command line, which must be the same for all.
    Raises UserError where the ranks cannot run together, and NotMet where some do not come.
    """
    global _met
    me = _introduce(rank, command)
    patience = _Patience(seconds, time.monotonic(), silent=rank > 0 and me.local_rank > 0)
    address = _address(world)
    listener = None if rank or _agent_serves() else _listen(*address)
    while True:
        store = _open_store(address, me, world, listener, patience)
        if _belongs(store, me, world, patience):
            break
        del store
    _met = Meeting(store, rank, world)
    order = _take_place(store, me, world, patience)
    new = next(number for number, other in enumerate(order) if other.rank == rank)
    mine = [other for other in order if other.node == me.node]
    os.environ.update(
        RANK=str(new), LOCAL_RANK=str(mine.index(order[new])), LOCAL_WORLD_SIZE=str(len(mine))
    )  # fmt: skip
    _met = Meeting(store, new, world, order)
    return _met


def joined(store: dist.Store, rank: int, world: int) -> None:
    """Note a world that needed no meeting, because one process started its ranks on this machine."""
    global _met
    node = socket.gethostname()
    _met = Meeting(store, rank, world, [Introduction(number, node, number, world) for number in range(world)])


def met() -> Meeting | None:
    """The meeting of this process's world, if it has several ranks."""
    return _met if _met is not None and _met.ranks else None


def leave_together(status: int, note: Callable[[int], bool]) -> int:
    """Wait until all ranks leave, and return the exit status of this process.

    note: called on rank 0 with the run's status; tells the launch script, and returns whether that succeeded. Then all
    ranks leave with 0, which no launcher takes for a failure, and the script knows better.
    """
    if _met is None:
        return 0 if note(status) else status
    store, rank, world = _met.store, _met.rank, _met.world
    came = (lambda other: True) if _met.ranks else (lambda other: store.check([f"here/{other}"]))
    with suppress(RuntimeError, OSError):  # the store is gone with rank 0
        store.set_timeout(timedelta(seconds=LEAVE_SECONDS))
        store.set(f"status/{rank}", str(status))
        if rank:
            final = int(store.get("leave")) if status else 0
            store.add("gone", 1)
            return final if final == 0 else status
        others = [other for other in range(1, world) if came(other)]
        _await(lambda: all(store.check([f"status/{other}"]) for other in others))
        known = [int(store.get(f"status/{other}")) for other in range(world) if store.check([f"status/{other}"])]
        status = next((one for one in SEVERITY if one in known), status)
        status = 0 if note(status) else status
        store.set("leave", str(status))
        _await(lambda: store.add("gone", 0) >= len(others))
        return status
    return status


def _await(done: Callable[[], bool]) -> None:
    end = time.monotonic() + LEAVE_SECONDS
    while not done() and time.monotonic() < end:
        time.sleep(0.02)


def _introduce(rank: int, command: Sequence[str] | None) -> Introduction:
    environment = launcher_environment()
    local_world = int(os.environ["LOCAL_WORLD_SIZE"]) if "LOCAL_WORLD_SIZE" in os.environ else None
    versions = {"longctx": longctx.__version__, "torch": torch.__version__, "Python": sys.version.split()[0]}
    versions["numpy"] = installed("numpy") or ""  # each node draws the documents, with numpy's random numbers
    cpus = sum(1 << core for core in os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0
    return Introduction(
        rank, node_name(), int(environment["LOCAL_RANK"]), local_world, cpus, versions,
        None if command is None else list(command),
    )  # fmt: skip


def _address(world: int) -> tuple[str, int]:
    host, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    missing = [name for name, value in (("MASTER_ADDR", host), ("MASTER_PORT", port)) if not value]
    if missing:
        raise UserError(
            f"WORLD_SIZE={world} says that a launcher started this rank, but {' and '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} not set; start all ranks with torchrun, launch/torchrun.sh or "
            "srun, or unset WORLD_SIZE (docs/training.md)"
        )
    if not port.isdigit() or not 0 < int(port) < 65536:
        raise UserError(f"MASTER_PORT={port!r} is not a port from 1 to 65535 (docs/training.md)")
    return host, int(port)


def _agent_serves() -> bool:
    """Whether torchrun's own process serves the store."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _listen(host: str, port: int) -> socket.socket:
    """Rank 0's listening socket. Raises UserError where another process has the port."""
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    for attempt in range(20):  # the run's own last attempt may still be leaving
        try:
            return socket.create_server(("", port), family=family, dualstack_ipv6=dual, backlog=4096)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise UserError(f"MASTER_PORT={port} cannot be opened on {node_name()}: {error.strerror}") from None
        if attempt < 19:
            time.sleep(0.1)
    raise UserError(
        f"MASTER_ADDR={host} MASTER_PORT={port}: the port is in use by another process on {node_name()}, perhaps by "
        "another run, so the ranks cannot meet there; end it, or choose a free port for all ranks (PORT for "
        "launch/torchrun.sh, torchrun --master-port, or export MASTER_PORT before srun; docs/training.md)"
    )


def _open_store(
    address: tuple[str, int], me: Introduction, world: int, listener: socket.socket | None, patience: _Patience
) -> dist.Store:
    """Connect to the store, and serve it on rank 0."""
    host, port = address
    while (problem := _unreachable(host, port)) is not None:
        words = (
            f"rank {me.rank} on {me.node} reaches nobody at MASTER_ADDR={host} MASTER_PORT={port} after "
            f"{patience.waited():.0f} s ({problem}). Rank 0 listens at this address once it is started: start the "
            "first node, and give every node its address (HEAD for launch/torchrun.sh)."
        )
        if not patience.tick(lambda words=words: words, pause=0.2):
            raise NotMet(words)
    own = listener is not None
    tcp = dist.TCPStore(
        host, port, world, is_master=own, timeout=timedelta(seconds=60), wait_for_workers=False,
        master_listen_fd=listener.detach() if listener is not None and listener.fileno() >= 0 else None,
    )  # fmt: skip
    return dist.PrefixStore(f"longctx/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", tcp)


def _unreachable(host: str, port: int) -> str | None:
    """Why no connection to the address is possible, in words; None where one is."""
    try:
        socket.create_connection((host, port), timeout=5.0).close()
    except OSError as error:
        return error.strerror or str(error)
    return None


def _belongs(store: dist.Store, me: Introduction, world: int, patience: _Patience) -> bool:
    """Whether the run that meets at the store is this rank's; False asks to come again later.

    A run that has met already may be the last attempt of this one, whose rank 0 is leaving.
    """
    token = os.environ.get(RUN_TOKEN, "")
    own = json.dumps({"token": token, "world": world, "node": me.node})
    if me.rank == 0:
        found = store.compare_set("run", "", own).decode()
        if json.loads(found) != json.loads(own):
            _refuse(store, f"rank 0 was started twice, on {json.loads(found)['node']} and on {me.node}{_ONE_NUMBER}")
        return True
    while not store.check(["run"]):
        if not patience.tick(lambda: f"rank {me.rank} on {me.node} waits for rank 0."):
            raise NotMet(f"rank {me.rank} on {me.node} met the store, but no rank 0 came")
    run = json.loads(store.get("run"))
    with _losing_rank_0(run["node"]):
        closed = store.check(["verdict"]) and "refused" not in json.loads(store.get("verdict"))
        if run["token"] == token and not closed:
            if run["world"] != world:
                _refuse(
                    store,
                    f"rank {me.rank} on {me.node} was started as one of {world} ranks, and rank 0 on {run['node']} as "
                    f"one of {run['world']}; give every node the same number of nodes and of ranks (NODES and GPUS "
                    "for launch/torchrun.sh)",
                )
            return True
    if patience.waited() > patience.news_seconds:
        raise UserError(
            f"rank {me.rank} on {me.node} found another run at MASTER_ADDR={os.environ['MASTER_ADDR']} MASTER_PORT="
            f"{os.environ['MASTER_PORT']} ({run['token'] or 'one that has met already'}, rank 0 on {run['node']}); "
            "give this run another port (PORT for launch/torchrun.sh, MASTER_PORT for srun; docs/training.md)"
        )
    time.sleep(1.0)
    return False


_ONE_NUMBER = "; every rank needs a number of its own (NODE_RANK for launch/torchrun.sh)"


def _refuse(store: dist.Store, text: str, status: int = 2) -> None:
    """Publish a refusal, unless there is a verdict already; every rank that waits for the verdict raises it."""
    store.compare_set("verdict", "", json.dumps({"refused": text, "status": status}))


def _take_place(store: dist.Store, me: Introduction, world: int, patience: _Patience) -> list[Introduction]:
    """Introduce this rank, and return the ranks in the order of the verdict."""
    with _losing_rank_0(os.environ["MASTER_ADDR"]):
        if store.add(f"claim/{me.rank}", 1) > 1:
            first = Introduction.read(store.get(f"here/{me.rank}"))
            _refuse(store, f"rank {me.rank} was started twice, on {first.node} and on {me.node}{_ONE_NUMBER}")
        else:
            store.set(f"here/{me.rank}", me.written())
            store.add("here", 1)
        if me.rank == 0:
            _judge(store, world, patience)
        pause = 0.02
        while not store.check(["verdict"]):
            time.sleep(pause)
            pause = min(0.5, 1.5 * pause)
        verdict: dict[str, Any] = json.loads(store.get("verdict"))
    if "refused" in verdict:
        raise (UserError if verdict["status"] == 2 else NotMet)(verdict["refused"])
    return [Introduction.read(text) for text in verdict["ranks"]]


def _judge(store: dist.Store, world: int, patience: _Patience) -> None:
    """Wait for all ranks and publish the verdict (rank 0)."""

    def here() -> list[Introduction]:
        there = [number for number in range(world) if store.check([f"here/{number}"])]
        return [Introduction.read(store.get(f"here/{number}")) for number in there]

    def missing() -> str:
        there = here()
        gone = sorted(set(range(world)) - {other.rank for other in there})
        nodes: dict[str, list[int]] = {}
        for other in there:
            nodes.setdefault(other.node, []).append(other.rank)
        who = "; ".join(f"{listed(ranks)} on {node}" for node, ranks in nodes.items())
        return (
            f"{len(there)} of {world} ranks have met after {patience.waited():.0f} s: {who}. Missing: {listed(gone)}. "
            "Start every node with the same command, a number of its own and the first node's address."
        )

    while store.add("here", 0) < world and not store.check(["verdict"]):
        if not patience.tick(missing, pause=0.05):
            _refuse(store, f"{missing()} The run gives up (launch.meeting_minutes)", status=1)
    if store.check(["verdict"]):
        return
    try:
        # What was compared is not sent back to all.
        order = [replace(one, versions={}, command=None) for one in place(here())]
    except UserError as error:
        _refuse(store, str(error))
    else:
        store.compare_set("verdict", "", json.dumps({"ranks": [other.written() for other in order]}))


@contextmanager
def _losing_rank_0(node: str) -> Iterator[None]:
    """Turn the loss of the store into NotMet."""
    try:
        yield
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        first = first_line(error)
        raise NotMet(f"rank 0 on {node} left before the ranks had met ({first}); its own message says why") from None
