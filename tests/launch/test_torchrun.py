"""launch/torchrun.sh: mistakes refused at once, and on two nodes in network namespaces its meeting and its signals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from longctx.bench import cluster
from longctx.processes import handles
from longctx.run.preflight import _check_clocks
from tests.launch.tiny import same_model, trains, words

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "launch" / "torchrun.sh"
HEAD = "10.77.0.1"  # the first node's address in launch/virtual_cluster.sh
needs_namespaces = pytest.mark.skipif(cluster.missing() is not None, reason=str(cluster.missing()))


def environment(**values: str) -> dict[str, str]:
    launcher = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "GROUP_RANK")
    kept = {name: value for name, value in os.environ.items() if name not in launcher}
    return {
        **kept, "PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
        "GPUS": "1", **values,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"NODES": "2", "HEAD": "a"}, "NODES=2 and NODE_RANK is not set: every node needs a number of its own, 0 to 1"),
        ({"NODES": "2", "NODE_RANK": "2", "HEAD": "a"}, "NODE_RANK=2 must be from 0 to 1, for NODES=2"),
        ({"NODES": "2", "NODE_RANK": "0"}, "NODES=2 and HEAD is not set: every node needs the first one's address"),
        ({"NODES": "two"}, "NODES='two' is not a whole number"),
        ({"GPUS": "0"}, "GPUS=0 must be 1 or more ranks"),
        ({}, "trane is not a known key"),
    ],
)
def test_a_mistake_is_refused_before_a_rank_starts(values: dict[str, str], words: str) -> None:
    done = subprocess.run(
        ["bash", str(SCRIPT), "model=tiny", "trane.x=1"], env=environment(**values), capture_output=True, text=True,
        check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith(f"longctx: {words}")
    assert done.stderr.count("\n") == 1


@pytest.mark.slow  # CI has twelve minutes
def test_a_preflight_names_nodes_and_links(tmp_path: Path) -> None:
    words = ["preflight", "hardware=cpu", f"folder={tmp_path}", "mbytes=1", "format=json"]
    done = subprocess.run(
        ["bash", str(SCRIPT), *words], env=environment(GPUS="2"), capture_output=True, text=True, check=False,
        timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [(node["ranks"], node["devices"]) for node in found["nodes"]] == [([0, 1], ["cpu", "cpu"])]
    assert [link["link"] for link in found["links"]] == ["all-reduce over all ranks", "ring hop inside a node"]
    assert all(link["gbytes"] > 0 for link in found["links"])
    assert found["problems"] == []
    assert not list(tmp_path.iterdir())


def test_clocks_that_are_apart_are_a_problem() -> None:
    there = [{"node": node, "clock_seconds": ahead} for node, ahead in (("a", 0.0), ("b", -3.5), ("c", 1.0))]
    (problem,) = _check_clocks(there, 2.0)
    assert problem.startswith("the clock of b differs from that of a by -3.5 s")


class Nodes:
    """Two nodes in namespaces, each of which runs shell commands; node n writes into FOLDER/NAME.n and .status."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def said(self, name: str) -> list[str]:
        return [(self.folder / f"{name}.{node}").read_text() for node in range(2)]

    def statuses(self, name: str, seconds: float = 240) -> list[int]:
        files = [self.folder / f"{name}.{node}.status" for node in range(2)]
        self.wait(lambda: all(file.exists() and file.read_text() for file in files), seconds)
        return [int(file.read_text()) for file in files]

    def wait(self, condition: Callable[[], bool], seconds: float = 240) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, {path.name: path.read_text() for path in self.folder.iterdir()}
            time.sleep(0.05)

    def pids(self, name: str) -> list[int]:
        """The scripts' own processes, once they exist."""
        files = [self.folder / f"{name}.{node}.pid" for node in range(2)]
        self.wait(lambda: all(file.exists() and file.read_text().strip() for file in files))
        return [int(file.read_text()) for file in files]


@contextmanager
def nodes(folder: Path, starts: dict[str, str]) -> Iterator[Nodes]:
    """Start launch/torchrun.sh on two nodes, once per name in `starts`, all at the same time.

    starts: name -> the variables and words of a start, in which $GROUP_RANK is the node's number.
    """
    lines = [
        f"(echo $BASHPID > {folder}/{name}.$GROUP_RANK.pid; export {start.replace(' -- ', f'; exec bash {SCRIPT} ')}) "
        f"> {folder}/{name}.$GROUP_RANK 2>&1 || status=$?; echo ${{status:-0}} > {folder}/{name}.$GROUP_RANK.status"
        for name, start in starts.items()
    ]
    body = "".join(f"({line}) &\n" for line in lines) + "wait\n"
    command = [str(cluster.script()), "run", "nodes=2", "ranks=1", "until=stdin", "--", "bash", "-c", body]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, env=environment(), stdout=subprocess.DEVNULL)
    try:
        yield Nodes(folder)
    finally:
        assert process.stdin is not None
        process.stdin.close()
        process.wait(60)


@pytest.mark.slow  # CI has 12 minutes
@pytest.mark.root
@needs_namespaces
def test_nodes_that_do_not_meet_are_named_within_the_meetings_minutes(tmp_path: Path) -> None:
    """A node that is not started, a wrong HEAD, and two first nodes."""
    short = "-- model=tiny launch.meeting_minutes=0.2"
    starts = {
        "missing": f"NODES=3 NODE_RANK=$GROUP_RANK HEAD={HEAD} PORT=20001 {short}",
        "head": f"NODES=2 NODE_RANK=$GROUP_RANK HEAD=10.77.0.$((1 + 8 * GROUP_RANK)) PORT=20002 {short}",
        "twice": f"NODES=2 NODE_RANK=0 HEAD={HEAD} PORT=20003 {short}",
    }
    with nodes(tmp_path, starts) as run:
        assert run.statuses("twice") == [2, 2], run.said("twice")
        assert run.statuses("missing") == [1, 1], run.said("missing")
        assert run.statuses("head") == [1, 1], run.said("head")
    first = run.said("missing")[0]
    assert "longctx: 2 of 3 ranks have met after" in first
    assert "(node 0); rank 1 on" in first
    assert "(node 1). Missing: rank 2. Start every node" in first
    assert "The run gives up (launch.meeting_minutes)" in first
    assert "longctx: 1 of 2 ranks have met" in run.said("head")[0]
    assert "reaches nobody at MASTER_ADDR=10.77.0.9 MASTER_PORT=20002 after" in run.said("head")[1]
    assert "rank 0 was started twice, on" in run.said("twice")[0]
    assert not [text for name in starts for text in run.said(name) if "Traceback" in text]


@pytest.mark.slow  # CI has 12 minutes
@pytest.mark.root
@needs_namespaces
def test_signals_to_the_scripts_reach_the_ranks_and_end_them(tmp_path: Path, undisturbed: Path) -> None:
    """USR1 while ranks import starts them again, TERM while they train saves and ends; the same command continues."""
    run_dir = tmp_path / "run"
    line = " ".join(f"'{word}'" for word in words(run_dir=run_dir))
    start = f"NODES=2 NODE_RANK=$GROUP_RANK HEAD={HEAD} PORT=20004 -- {line}"
    with nodes(tmp_path, {"one": start}) as run:
        scripts = run.pids("one")
        run.wait(lambda: all(handles(pid, signal.SIGUSR1) for pid in scripts))
        run.wait(lambda: all(_children(pid) for pid in scripts))
        for pid in scripts:
            os.kill(pid, signal.SIGUSR1)
        run.wait(lambda: trains(run_dir))
        for pid in scripts:
            os.kill(pid, signal.SIGTERM)
        assert run.statuses("one") == [75, 75], run.said("one")
        assert not _processes_of(run_dir)
    for said in run.said("one"):
        assert said.count("the ranks are started again (1 of launch.requeues)") == 1
        assert "Traceback" not in said
    assert "SIGUSR1: nothing was trained" in run.said("one")[0]
    assert "SIGTERM: saved at step" in run.said("one")[0]
    with nodes(tmp_path, {"two": start}) as run:
        assert run.statuses("two") == [0, 0], run.said("two")
    assert "continuing at step" in run.said("two")[0]
    assert same_model(run_dir, undisturbed)


def _children(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


def _processes_of(run: Path) -> list[str]:
    """The command lines of processes that still train in the run's folder, but for the shells around the scripts."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if str(run) in command and "longctx.run" in command and "bash -c" not in command:
            found.append(command)
    return found
