"""launch/slurm.sbatch under a real Slurm of four virtual nodes: placements, signals, requeues, statuses, a lost node.

`pytest -m slow tests/launch` runs them; that also repeats the refusal ten times and signals at twenty instants.
"""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from longctx.train import metrics
from tests.launch.tiny import same_model, steps_of, words
from tests.launch.virtual_slurm import SCRIPT, SlurmJob, VirtualSlurm, missing, until

pytestmark = [
    pytest.mark.skipif(missing() is not None, reason=f"a virtual Slurm {missing()}"),
    pytest.mark.slow,  # four minutes, and CI has twelve
]
PAIR = ("--nodes=2", "--ntasks-per-node=1")


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VirtualSlurm]:
    with VirtualSlurm(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def array(slurm: VirtualSlurm, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The run folders of an array of two jobs that share both their nodes."""
    folder = tmp_path_factory.mktemp("array")
    script = folder / "array.sh"
    script.write_text(f'#!/bin/bash\nexec bash {SCRIPT} "$@" run_dir={folder}/run$SLURM_ARRAY_TASK_ID\n')
    log = folder / "log-%a"
    job = slurm.submit(
        words(), log, *PAIR, "--array=0-1", f"--nodelist={slurm.names[0]},{slurm.names[1]}", script=script
    )
    tasks = [SlurmJob(slurm, f"{job.number}_{task}", folder / f"log-{task}") for task in range(2)]
    statuses = [task.ended() for task in tasks]
    assert statuses == [0, 0], [task.said for task in tasks]
    times = [(task.facts()["StartTime"], task.facts()["EndTime"]) for task in tasks]
    assert max(begin for begin, _ in times) < min(end for _, end in times), "they did not run at the same time"
    return [folder / "run0", folder / "run1"]


def test_two_jobs_on_the_same_nodes_do_not_meet_each_other(array: list[Path]) -> None:
    assert same_model(*array)
    line = metrics.read(array[0] / "metrics.jsonl")[-1]
    assert (line["nodes"], line["ranks_per_node"], line["cp"]) == (2, 1, 2)


def test_signals_while_starting_and_training_save_and_requeue(
    slurm: VirtualSlurm, array: list[Path], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    job = slurm.submit(words(run_dir=run), tmp_path / "log", *PAIR)
    job.wait(lambda: job.runs_rank(0))  # before that, Slurm has nobody to give the signal to
    slurm("scancel", "-s", "USR1", job.number, check=True)  # the ranks import, or have not begun
    job.continue_now()
    assert "nothing was trained; the same command continues the run" in job.said
    job.wait(lambda: steps_of(run) >= 2)
    slurm("scancel", "--batch", "-s", "USR1", job.number, check=True)  # as --signal=B:USR1@600 does
    job.continue_now()
    assert "SIGUSR1: saved at step" in job.said
    assert job.ended() == 0, job.said
    assert job.facts()["Restarts"] == "2"
    assert "Force Terminated" not in job.said
    assert "continuing at step" in job.said
    assert same_model(run, array[0])


def test_cyclic_ranks_are_numbered_node_by_node_and_the_adapter_outlasts_slurm_wait(
    slurm: VirtualSlurm, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    pair = ",".join(slurm.names[2:])
    options = ("--nodes=2", "--ntasks-per-node=2", "--distribution=cyclic", f"--nodelist={pair}")
    given = words(steps=2, run_dir=run, adapter=True)
    job = slurm.submit(given, tmp_path / "log", *options, environment={"SLURM_WAIT": "2"})
    assert job.ended() == 0, job.said
    assert (run / "adapter" / "adapter_config.json").exists(), job.said
    first = (run / "config.yaml").read_text().splitlines()
    assert first[0] == f"# 2 nodes of 2 ranks: {pair.replace(',', ', ')}"
    assert first[1].endswith("double_ring, inner ring of 2 ranks inside a node, outer ring of 2 between nodes")
    assert first[0].removeprefix("# ") in job.said
    assert yaml.safe_load((run / "config.yaml").read_text())["name"]
    line = metrics.read(run / "metrics.jsonl")[-1]
    assert (line["nodes"], line["ranks_per_node"]) == (2, 2)
    assert line["rings"].startswith("double_ring, inner ring of 2 ranks inside a node")
    assert "2 x 2" in (run / "report.html").read_text()


def submit(slurm: VirtualSlurm, run: Path, *given: str) -> subprocess.CompletedProcess[str]:
    """`longctx submit` on the login node, for ranks without GPUs."""
    stage = "+curriculum.stages.s128={seq_len: 128, theta: 40000, steps: 2, batch: 2}"
    cluster = ("launch.gpus_per_node=0", "launch.ranks_per_node=1", "launch.cpus_per_task=1", "engine.device=cpu")
    command = [sys.executable, "-m", "longctx.cli", "submit", *words(steps=2, run_dir=run), stage, *cluster, *given]
    return subprocess.run(command, env=slurm.environment, capture_output=True, text=True, timeout=120)


def test_submit_chains_a_job_for_each_stage(slurm: VirtualSlurm, tmp_path: Path) -> None:
    """The second stage has two nodes, and begins when the first has ended on one."""
    run = tmp_path / "run"
    done = submit(slurm, run, "launch.per_stage=true", "launch.nodes_by_stage={s128: 2}", "name=chain")
    assert done.returncode == 0, done.stderr
    numbers = re.findall(r"^job (\d+): chain-s(?:64|128) on [12] node", done.stderr, flags=re.M)
    jobs = [
        SlurmJob(slurm, number, run / "logs" / f"chain-{name}-{number}-rank0.log")
        for number, name in zip(numbers, ("s64", "s128"), strict=True)
    ]
    assert [job.ended() for job in jobs] == [0, 0], [job.said for job in jobs]
    rows = metrics.read(run / "metrics.jsonl")
    assert [(row["stage"], row["cp"]) for row in rows] == [("s64", 1)] * 2 + [("s128", 2)] * 2
    assert not (run / "stages/s128").stat().st_mtime < (run / "stages/s64/finished.json").stat().st_mtime


def test_slurm_s_refusal_and_a_wrong_key_are_paragraphs_of_submit(slurm: VirtualSlurm, tmp_path: Path) -> None:
    done = submit(slurm, tmp_path / "run", "launch.partition=nowhere")
    assert done.returncode == 2
    assert "longctx: Slurm refuses the job: sbatch: error: invalid partition specified: nowhere" in done.stderr
    assert "change what it names (launch.partition" in done.stderr
    done = submit(slurm, tmp_path / "run", "optim.clip=1")
    assert (done.returncode, slurm("squeue", "-h")) == (2, "")
    assert "optim.clip is now `optim.max_grad_norm`" in done.stderr


def test_nodes_of_different_sizes_are_refused(slurm: VirtualSlurm, tmp_path: Path) -> None:
    job = slurm.submit(words(run_dir=tmp_path / "run"), tmp_path / "log", "--nodes=2", "--ntasks=3", "--exclusive")
    assert job.ended() == 2, job.said
    shown = f"({slurm.names[0]} has 2, {slurm.names[1]} has 1)"
    assert f"longctx: the nodes have different numbers of ranks {shown}" in job.said
    assert "Terminating" not in job.said


def test_a_wrong_key_ends_with_status_2_and_its_message(slurm: VirtualSlurm, tmp_path: Path) -> None:
    check_refused(slurm, tmp_path, *PAIR)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_wrong_key_ends_with_status_2_every_time_in_ten(slurm: VirtualSlurm, tmp_path: Path) -> None:
    for number in range(10):
        (tmp_path / str(number)).mkdir()
        check_refused(slurm, tmp_path / str(number), "--nodes=4", "--ntasks-per-node=1")


def check_refused(slurm: VirtualSlurm, folder: Path, *options: str) -> None:
    job = slurm.submit([*words(run_dir=folder / "run"), "trane.x=1"], folder / "log", *options)
    assert job.ended() == 2, job.said
    assert job.said.count("longctx: trane is not a known key") == 1
    assert "Terminating" not in job.said


def test_a_killed_rank_gets_a_last_line_and_status_1(slurm: VirtualSlurm, tmp_path: Path) -> None:
    run = tmp_path / "run"
    job = slurm.submit(words(steps=4000, run_dir=run), tmp_path / "log", *PAIR)
    job.wait(lambda: steps_of(run) >= 2)
    os.kill(job.pid_of_rank(1), signal.SIGKILL)
    assert job.ended() == 1, job.said
    last = next(line for line in reversed(job.said.splitlines()) if line.startswith("longctx: "))
    assert last.startswith("longctx: rank 0 lost its peers and stops (")
    assert "is saved, the same command continues the run" in last
    assert job.facts()["Restarts"] == "0"


def test_a_lost_node_requeues_the_job_which_continues_elsewhere(
    slurm: VirtualSlurm, array: list[Path], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    job = slurm.submit(words(run_dir=run), tmp_path / "log", *PAIR)
    job.wait(lambda: steps_of(run) >= 2)
    slurm("scontrol", "update", f"nodename={slurm.names[1]}", "state=down", "reason=lost", check=True)
    try:
        job.continue_now()
        assert job.ended() == 0, job.said
    finally:
        slurm("scontrol", "update", f"nodename={slurm.names[1]}", "state=resume")
    assert "continuing at step" in job.said
    assert same_model(run, array[0])


@pytest.mark.slow
def test_a_cancelled_job_saves_and_stays_cancelled(slurm: VirtualSlurm, tmp_path: Path) -> None:
    job = slurm.submit(words(steps=4000, run_dir=tmp_path / "run"), tmp_path / "log", *PAIR)
    job.wait(lambda: steps_of(tmp_path / "run") >= 2)
    slurm("scancel", job.number)
    job.ended()
    until(lambda: job.state != "CANCELLED", 10, must=False)
    assert (job.state, job.facts()["Restarts"]) == ("CANCELLED", "0")
    assert "SIGTERM: saved at step" in job.said


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_signals_at_twenty_instants_are_saved_or_not_and_requeued(
    slurm: VirtualSlurm, array: list[Path], tmp_path: Path
) -> None:
    """Runs that get five signals each, the first seconds more often than others."""
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
        assert same_model(run, array[0])
