"""launch/slurm.sbatch under a real Slurm of four virtual nodes: placements, signals, requeues, statuses, a lost node.

They run where Slurm is installed (`missing`). `pytest -m slow tests/launch` also signals at twenty instants.
Jobs that only have to end are submitted first and run beside the others.
"""

from __future__ import annotations

import os
import random
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from longctx import cli
from longctx.train import metrics
from tests.launch.tiny import same_model, steps_of, trains, words
from tests.launch.virtual_slurm import SCRIPT, SlurmJob, VirtualSlurm, missing, until

pytestmark = [
    pytest.mark.skipif(missing() is not None, reason=f"a virtual Slurm {missing()}"),
    pytest.mark.timeout(900),  # the first test waits for the jobs that the others look at
]
PAIR = ("--nodes=2", "--ntasks-per-node=1")


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VirtualSlurm]:
    with VirtualSlurm(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


def array(
    slurm: VirtualSlurm, folder: Path, count: int, given: list[str], *options: str, at_once: int
) -> list[SlurmJob]:
    """Submit an array of jobs whose run folders are FOLDER/runN."""
    script = folder / "array.sh"
    script.write_text(f'#!/bin/bash\nexec bash {SCRIPT} "$@" run_dir={folder}/run$SLURM_ARRAY_TASK_ID\n')
    options = (*PAIR, f"--array=0-{count - 1}%{at_once}", "--open-mode=append", *options)
    job = slurm.submit(given, folder / "log-%a", *options, script=script)
    return [SlurmJob(slurm, f"{job.number}_{task}", folder / f"log-{task}") for task in range(count)]


@pytest.fixture(scope="module")
def three(slurm: VirtualSlurm, tmp_path_factory: pytest.TempPathFactory) -> list[SlurmJob]:
    """An array of three jobs on the same two nodes: a rank of one is killed, one is cancelled, one gets USR1."""
    folder = tmp_path_factory.mktemp("three")
    jobs = array(slurm, folder, 3, words(), f"--nodelist={slurm.names[0]},{slurm.names[1]}", at_once=3)
    killed, cancelled, signalled = jobs
    killed.wait(lambda: trains(folder / "run0"))
    assert [job.state for job in jobs] == ["RUNNING"] * 3, "they do not run at the same time"
    os.kill(killed.pid_of_rank(1), signal.SIGKILL)
    cancelled.wait(lambda: trains(folder / "run1"))
    slurm("scancel", cancelled.number, check=True)
    signalled.wait(lambda: trains(folder / "run2"))
    slurm("scancel", "--batch", "-s", "USR1", signalled.number, check=True)  # as --signal=B:USR1@600 does
    return jobs


@pytest.fixture(scope="module")
def refused(slurm: VirtualSlurm, three: object, tmp_path_factory: pytest.TempPathFactory) -> list[SlurmJob]:
    """Two jobs with a wrong key, and one on nodes of different sizes; they run beside the three."""
    folder = tmp_path_factory.mktemp("refused")
    nodes = f"--nodelist={slurm.names[2]},{slurm.names[3]}"
    uneven = slurm.submit(words(run_dir=folder / "uneven"), folder / "log", "--nodes=2", "--ntasks=3", nodes)
    return [uneven, *wrong_key(slurm, folder, 2)]


def wrong_key(slurm: VirtualSlurm, folder: Path, count: int) -> list[SlurmJob]:
    nodes = f"--nodelist={slurm.names[2]},{slurm.names[3]}"
    return array(slurm, folder, count, [*words(), "trane.x=1"], nodes, at_once=2)


@pytest.fixture(scope="module")
def cyclic(slurm: VirtualSlurm, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, SlurmJob]:
    """A job of two nodes of two ranks that Slurm numbers across the nodes, whose rank 0 makes an adapter at the end."""
    run = tmp_path_factory.mktemp("cyclic") / "run"
    nodes = f"--nodelist={slurm.names[2]},{slurm.names[3]}"
    options = ("--nodes=2", "--ntasks-per-node=2", "--distribution=cyclic", nodes)
    given = words(steps=2, run_dir=run, adapter=True)
    return run, slurm.submit(given, run.parent / "log", *options, environment={"SLURM_WAIT": "2"})


@pytest.mark.usefixtures("refused")
def test_a_job_that_is_signalled_twice_and_loses_a_node_ends_as_an_undisturbed_one(
    slurm: VirtualSlurm, three: list[SlurmJob], undisturbed: Path
) -> None:
    """USR1 while it trains, USR1 while it starts, and a node that is lost: three times back into the queue."""
    job, run = three[2], three[2].log.with_name("run2")
    job.continue_now()
    assert "SIGUSR1: saved at step" in job.said
    job.wait(lambda: job.runs_rank(0))  # before that, Slurm has nobody to give the signal to
    slurm("scancel", "-s", "USR1", job.number, check=True)  # the ranks import, or have not begun
    job.continue_now()
    assert "SIGUSR1: nothing was trained; the same command continues the run" in job.said
    assert "Force Terminated" not in job.said
    before = steps_of(run)
    job.wait(lambda: steps_of(run) > before)
    slurm("scontrol", "update", f"nodename={slurm.names[1]}", "state=down", "reason=lost", check=True)
    try:
        job.continue_now("ReqNodeList=")
        assert job.ended() == 0, job.said
    finally:
        slurm("scontrol", "update", f"nodename={slurm.names[1]}", "state=resume")
    assert job.facts()["Restarts"] == "3"
    assert job.said.count("continuing at step") == 2
    assert same_model(run, undisturbed)
    line = metrics.read(run / "metrics.jsonl")[-1]
    assert (line["nodes"], line["ranks_per_node"], line["cp"]) == (2, 1, 2)


def test_a_killed_rank_gets_a_last_line_and_status_1(three: list[SlurmJob]) -> None:
    job = three[0]
    assert job.ended() == 1, job.said
    last = next(line for line in reversed(job.said.splitlines()) if line.startswith("longctx: "))
    assert last.startswith("longctx: rank 0 lost its peers and stops (")
    assert "is saved, the same command continues the run" in last
    assert job.facts()["Restarts"] == "0"


def test_a_cancelled_job_saves_and_stays_cancelled(three: list[SlurmJob]) -> None:
    job = three[1]
    job.ended()
    assert (job.state, job.facts()["Restarts"]) == ("CANCELLED", "0")
    assert "SIGTERM: saved at step" in job.said


def test_a_wrong_key_ends_with_status_2_and_its_message(refused: list[SlurmJob]) -> None:
    for job in refused[1:]:
        assert_refused_for_the_key(job)


@pytest.mark.slow
def test_a_wrong_key_is_told_every_time_in_ten(slurm: VirtualSlurm, tmp_path: Path) -> None:
    """srun kills the other ranks as soon as one has left with a status, which may be the one that speaks."""
    for job in wrong_key(slurm, tmp_path, 10):
        assert_refused_for_the_key(job)


def assert_refused_for_the_key(job: SlurmJob) -> None:
    assert job.ended() == 2, job.said
    assert job.said.count("longctx: trane is not a known key") == 1
    assert "Terminating" not in job.said


def test_nodes_of_different_sizes_are_refused(slurm: VirtualSlurm, refused: list[SlurmJob]) -> None:
    job = refused[0]
    assert job.ended() == 2, job.said
    shown = f"({slurm.names[2]} has 2, {slurm.names[3]} has 1)"
    assert f"longctx: the nodes have different numbers of ranks {shown}" in job.said
    assert "Terminating" not in job.said


@pytest.fixture
def submit(slurm: VirtualSlurm, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path):
    """A function that runs `longctx submit WORDS` as on a login node, for ranks without GPUs: (status, output)."""
    for name, value in slurm.environment.items():
        monkeypatch.setenv(name, value)
    stage = "+curriculum.stages.s128={seq_len: 128, theta: 40000, steps: 2, batch: 2}"
    cluster = ("launch.gpus_per_node=0", "launch.ranks_per_node=1", "launch.cpus_per_task=1", "engine.device=cpu")

    def submitted(*given: str) -> tuple[int, str]:
        status = cli.main(["submit", *words(steps=2, run_dir=tmp_path / "run"), stage, *cluster, *given])
        return status, capsys.readouterr().err

    return submitted


@pytest.mark.usefixtures("cyclic")
def test_submit_chains_a_job_for_each_stage(slurm: VirtualSlurm, submit, tmp_path: Path) -> None:
    """The second stage has two nodes, and begins when the first has ended on one."""
    run = tmp_path / "run"
    status, said = submit("launch.per_stage=true", "launch.nodes_by_stage={s128: 2}", "name=chain")
    assert status == 0, said
    numbers = re.findall(r"^job (\d+): chain-s(?:64|128) on [12] node", said, flags=re.M)
    jobs = [
        SlurmJob(slurm, number, run / "logs" / f"chain-{name}-{number}-rank0.log")
        for number, name in zip(numbers, ("s64", "s128"), strict=True)
    ]
    assert [job.ended() for job in jobs] == [0, 0], [job.said for job in jobs]
    rows = metrics.read(run / "metrics.jsonl")
    assert [(row["stage"], row["cp"]) for row in rows] == [("s64", 1)] * 2 + [("s128", 2)] * 2
    assert jobs[1].facts()["StartTime"] >= jobs[0].facts()["EndTime"]


def test_cyclic_ranks_are_numbered_node_by_node_and_the_adapter_outlasts_slurm_wait(
    slurm: VirtualSlurm, cyclic: tuple[Path, SlurmJob]
) -> None:
    run, job = cyclic
    assert job.ended() == 0, job.said
    assert (run / "adapter" / "adapter_config.json").exists(), job.said
    first = (run / "config.yaml").read_text().splitlines()
    assert first[0] == f"# 2 nodes of 2 ranks: {slurm.names[2]}, {slurm.names[3]}"
    assert first[1].endswith("double_ring, inner ring of 2 ranks inside a node, outer ring of 2 between nodes")
    assert first[0].removeprefix("# ") in job.said
    assert yaml.safe_load((run / "config.yaml").read_text())["name"]
    line = metrics.read(run / "metrics.jsonl")[-1]
    assert (line["nodes"], line["ranks_per_node"]) == (2, 2)
    assert line["rings"].startswith("double_ring, inner ring of 2 ranks inside a node")
    assert "2 x 2" in (run / "report.html").read_text()


def test_slurm_s_refusal_and_a_wrong_key_are_paragraphs_of_submit(slurm: VirtualSlurm, submit) -> None:
    status, said = submit("launch.partition=nowhere")
    assert status == 2
    assert "longctx: Slurm refuses the job: sbatch: error: invalid partition specified: nowhere" in said
    assert "change what it names (launch.partition" in said
    status, said = submit("optim.clip=1")
    assert (status, slurm("squeue", "-h")) == (2, "")
    assert "optim.clip is now `optim.max_grad_norm`" in said


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_signals_at_twenty_instants_are_saved_or_not_and_requeued(
    slurm: VirtualSlurm, undisturbed: Path, tmp_path: Path
) -> None:
    """Runs that get five signals each, most of them in their first seconds."""
    rng, sent, runs = random.Random(1), 0, 0
    while sent < 20:
        runs += 1
        run = tmp_path / f"run{runs}"
        job = slurm.submit([*words(run_dir=run), "launch.requeues=30"], tmp_path / f"log{runs}", *PAIR)
        for restarts in range(1, 6):
            job.wait(lambda job=job: job.step_runs() or job.state == "COMPLETED")
            if until(lambda job=job: job.state != "RUNNING", 14.0 * rng.random() ** 2, must=False):
                break  # the run was quicker
            slurm("scancel", "-s", "USR1", job.number)
            sent += 1
            job.continue_now()
            assert int(job.facts()["Restarts"]) == restarts, job.said
        assert job.ended() == 0, job.said
        assert same_model(run, undisturbed)
