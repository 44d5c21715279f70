"""The launcher's environment: torchrun's variables, srun's variables under torch's names, or one process."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from longctx.distributed.launcher import RUN_TOKEN, launcher_environment, leave_launcher
from longctx.errors import UserError

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
OURS = (*NAMES, "MASTER_ADDR", "MASTER_PORT", "GROUP_RANK", RUN_TOKEN)


def given(monkeypatch: pytest.MonkeyPatch, **values: str) -> dict[str, str]:
    """launcher_environment() in an environment with these variables only; the test's changes are undone."""
    for name in [*OURS, *(name for name in os.environ if name.startswith("SLURM_"))]:
        monkeypatch.setenv(name, "")  # remembered, so that what the function sets goes with the test
        monkeypatch.delenv(name)
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    return launcher_environment()


STEP = {
    "SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1", "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    "SLURM_STEP_NODELIST": "node[03-04]", "SLURM_JOB_ID": "41234",
}  # fmt: skip


def test_nothing_given_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(given(monkeypatch).values()) == ["0", "1", "0", "1"]


def test_srun_speaks_through_torchs_names(monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(given(monkeypatch, **STEP).values()) == ["5", "8", "1", "4"]
    assert (os.environ["MASTER_ADDR"], os.environ[RUN_TOKEN]) == ("node03", "Slurm job 41234, step 0")
    leave_launcher()
    assert list(launcher_environment().values()) == ["0", "1", "0", "1"]


def test_jobs_and_steps_that_share_a_node_have_ports_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    ports = []
    for job in range(41000, 41020):
        for step in range(20):
            given(monkeypatch, **{**STEP, "SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)})
            ports.append(int(os.environ["MASTER_PORT"]))
    assert len(set(ports)) == len(ports)
    assert 1024 < min(ports) < max(ports) < 32768


def test_a_port_that_the_user_chose_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    given(monkeypatch, **STEP, MASTER_PORT="777")
    assert os.environ["MASTER_PORT"] == "777"


@pytest.mark.parametrize(("node", "count"), [("0", "2"), ("1", "1"), ("2", "1"), ("3", "4")])
def test_nodes_may_have_different_numbers_of_tasks(monkeypatch: pytest.MonkeyPatch, node: str, count: str) -> None:
    uneven = {"SLURM_STEP_TASKS_PER_NODE": "2,1(x2),4", "SLURM_NODEID": node, "SLURM_LOCALID": "0"}
    assert given(monkeypatch, **{**STEP, **uneven})["LOCAL_WORLD_SIZE"] == count


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"WORLD_SIZE": "2"}, "RANK is not set"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK=2 WORLD_SIZE=2 LOCAL_RANK=0 LOCAL_WORLD_SIZE=1 contradict"),
        ({"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "1"}, "contradict each other"),
        ({"WORLD_SIZE": "2", "RANK": "0", "LOCAL_WORLD_SIZE": "4"}, "contradict each other"),
        ({"WORLD_SIZE": "two", "RANK": "0"}, "WORLD_SIZE='two' is not a whole number"),
    ],
)
def test_variables_that_contradict_each_other_are_refused(
    monkeypatch: pytest.MonkeyPatch, values: dict[str, str], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        given(monkeypatch, **values)


def test_torchrun_inside_a_slurm_step_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    torchrun = dict(zip(NAMES, ("1", "2", "1", "2"), strict=True))
    assert list(given(monkeypatch, **STEP, **torchrun).values()) == ["1", "2", "1", "2"]


def test_a_step_of_one_task_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    one = {**STEP, "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}
    assert list(given(monkeypatch, **one).values()) == ["0", "1", "0", "1"]


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node7", "node7"), ("a,b", "a"), ("gpu[003,007]", "gpu003"), ("gpu[3-5,9]", "gpu3"), ("a[1-2],b3", "a1"),
        ("a,b[1-2]", "a"), ("n[1-2]-ib", "n1-ib"), ("r[1-2]n[03,05-07].cluster,x", "r1n03.cluster"), ("a-b-1", "a-b-1"),
    ],
)  # fmt: skip
def test_the_first_host_of_the_list_is_the_master(monkeypatch: pytest.MonkeyPatch, nodes: str, first: str) -> None:
    given(monkeypatch, **{**STEP, "SLURM_STEP_NODELIST": nodes})
    assert os.environ["MASTER_ADDR"] == first


def test_asking_for_the_rank_needs_no_torch() -> None:
    code = "import sys; from longctx.distributed.launcher import launcher_environment as e; e(); print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"
