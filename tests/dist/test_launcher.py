"""The launcher's environment: torchrun's names as they are, srun's under torch's names, one process otherwise."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from longctx.distributed.launcher import launcher_environment

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
OURS = (*NAMES, "MASTER_ADDR", "MASTER_PORT")


def given(monkeypatch: pytest.MonkeyPatch, **values: str) -> dict[str, str]:
    """launcher_environment() in an environment with these names only; what it sets is forgotten after the test."""
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
    assert (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]) == ("node03", "21234")


def test_torchrun_inside_a_slurm_step_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    torchrun = dict(zip(NAMES, ("1", "2", "1", "2"), strict=True))
    assert list(given(monkeypatch, **STEP, **torchrun).values()) == ["1", "2", "1", "2"]


def test_a_step_of_one_task_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    one = {**STEP, "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}
    assert list(given(monkeypatch, **one).values()) == ["0", "1", "0", "1"]


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("node7", "node7"), ("a,b", "a"), ("gpu[003,007]", "gpu003"), ("gpu[3-5,9]", "gpu3"), ("a[1-2],b3", "a1")],
)
def test_the_first_host_of_the_list_is_the_master(monkeypatch: pytest.MonkeyPatch, nodes: str, first: str) -> None:
    given(monkeypatch, **{**STEP, "SLURM_STEP_NODELIST": nodes})
    assert os.environ["MASTER_ADDR"] == first


def test_asking_for_the_rank_needs_no_torch() -> None:
    code = "import sys; from longctx.distributed.launcher import launcher_environment as e; e(); print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"
