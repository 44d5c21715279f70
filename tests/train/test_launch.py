"""Ranks as processes: signals, deaths, ctrl-C, two torchrun agents, another number of ranks.

Slow tests: `pytest -m slow tests/train/test_launch.py`. The soak with many kills: `longctx bench
faults kills=50 sigterms=10`.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from longctx.processes import alive, children
from longctx.train import metrics, runfolder
from tests import warm
from tests.dist.ranks import forked

from .launched import Launched, Started
from .made import config, write_documents

LONG = {"stages": {"s64": {"seq_len": 64, "theta": 10000, "steps": 4000, "batch": 4}}}
TWO = {"nproc": 2, "threads": 1}


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_documents(tmp_path_factory.mktemp("documents") / "docs")


def start(run: Path, documents: Path, **changes: object) -> Launched:
    runfolder.prepare(config(run, documents, **{"launch": TWO, **changes}))
    return Launched(run)


def test_a_dead_rank_takes_the_run_down_and_a_signal_saves_it(tmp_path: Path, documents: Path) -> None:
    life = start(tmp_path / "run", documents, curriculum=LONG)
    assert life.wait_for_step(3), life.wait()
    ranks = children(life.pid)
    assert len(ranks) == 2
    os.kill(ranks[1], signal.SIGKILL)
    status, said = life.wait()
    assert status == 1
    assert said.strip().splitlines()[-1].startswith("longctx: rank 1 was ended by SIGKILL")
    assert "Traceback" not in said
    assert not any(alive(pid) for pid in ranks)
    again = Launched(tmp_path / "run")
    reached = again.saved_step() + 4  # the kill may have met the save of step 2 while it was written
    assert again.wait_for_step(reached), again.wait()
    status, said = again.terminate()
    assert status == 75, said
    assert again.saved_step() == again.step() >= reached
    assert f"saved at step {again.step()}" in said


def test_ctrl_c_leaves_one_line_and_no_process(tmp_path: Path, documents: Path) -> None:
    life = start(tmp_path / "run", documents, curriculum=LONG)
    assert life.wait_for_step(2), life.wait()
    ranks = children(life.pid)
    os.killpg(life.pid, signal.SIGINT)  # a terminal sends it to the whole group
    status, said = life.wait()
    assert status == 130
    assert said.strip().splitlines()[-1].startswith("longctx: interrupted; ")
    assert "Traceback" not in said
    assert not any(alive(pid) for pid in ranks)


@pytest.mark.slow  # CI has twelve minutes
def test_two_agents_as_two_nodes_give_the_losses_of_one_process(tmp_path: Path, documents: Path) -> None:
    """torchrun twice, one rank each."""
    made = config(tmp_path / "run", documents, parallel={"cp_by_stage": {"s64": 1}})
    runfolder.prepare(made)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    command += ["--master-addr", "localhost", "--master-port", str(port)]
    agents = [
        subprocess.Popen(
            [*command, "--node-rank", str(node), "-m", "longctx.run", "--resolved",
             str(tmp_path / "run" / "config.yaml")],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for node in range(2)
    ]  # fmt: skip
    said = [agent.communicate(timeout=200)[0] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], said
    from longctx.train.train import train

    assert train(config(tmp_path / "alone", documents)) == 0
    both = [metrics.read(tmp_path / name / "metrics.jsonl") for name in ("run", "alone")]
    assert both[0][0]["dp"] == 2
    losses = [[line["loss"] for line in lines] for lines in both]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize("module", [["longctx.run"], ["longctx", "train"]])
def test_a_different_command_on_one_node_is_refused(tmp_path: Path, module: list[str]) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    ranks = [
        forked(
            warm.command, ["-m", *module, f"name=run{rank}", f"model.path={tmp_path}"], str(tmp_path),
            {**os.environ, "RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1",
             "GROUP_RANK": str(rank), "MASTER_ADDR": "localhost", "MASTER_PORT": port},
            log=tmp_path / f"rank{rank}",
        )
        for rank in range(2)
    ]  # fmt: skip
    for rank in ranks:
        rank.join(120)
    said = ["".join((tmp_path / f"rank{rank}.{end}").read_text() for end in ("out", "err")) for rank in range(2)]
    assert [rank.exitcode for rank in ranks] == [2, 2], said
    assert "(node 1) was started with another command line than rank 0" in said[0]
    assert "it has name=run1 and lacks name=run0" in said[0]
    assert json.dumps(said[1]) == '""'


@pytest.mark.slow  # CI has 12 minutes
def test_the_torchrun_script_starts_again_what_was_saved_on_a_signal(tmp_path: Path, documents: Path) -> None:
    """A signal to a rank saves the run and starts it again, launch.requeues times; one to the script ends it."""
    runfolder.prepare(config(tmp_path / "run", documents, curriculum=LONG, launch={"requeues": 1}))
    script = Path(__file__).parents[2] / "launch" / "torchrun.sh"
    environment = {
        **{name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")},
        "GPUS": "2", "PYTHON": sys.executable, "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    with open(tmp_path / "log", "w+") as log:
        words = ["bash", str(script), "--resolved", str(tmp_path / "run/config.yaml")]
        life = subprocess.Popen(words, stdout=log, stderr=log, env=environment, start_new_session=True)
        watched = Started(tmp_path / "run", life)
        for _ in range(2):
            assert watched.wait_for_step(watched.saved_step() + 4), (tmp_path / "log").read_text()
            os.kill(children(life.pid)[0], signal.SIGUSR1)
            gone = time.monotonic() + 60
            while watched.saved_step() < watched.step() and time.monotonic() < gone:
                time.sleep(0.1)
        assert life.wait(120) == 75, (tmp_path / "log").read_text()
        said = (tmp_path / "log").read_text()
    assert said.count("the ranks are started again") == 1
    assert said.count("saved at step") == 2
    assert "Traceback" not in said
