"""The environment that torchrun or srun gives to a rank, under torch's names; this module does not import torch."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping

from longctx.errors import UserError

RUN_TOKEN = "LONGCTX_RUN"  # names the job and step that a rank belongs to; empty under launchers that name none
NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
TORCH_SWITCHES = ("TORCH_CPP_LOG_LEVEL", "TORCH_DISTRIBUTED_DEBUG", "TORCH_SHOW_CPP_STACKTRACES")
_PORTS = range(12000, 32000)  # below 32768, where Linux begins to hand out ports to outgoing connections


def leave_launcher() -> None:
    """Remove the launcher's variables, so that this process is a world of its own and no rank of torchrun or srun."""
    for name in [name for name in os.environ if name.startswith("SLURM_STEP_")]:
        del os.environ[name]
    for name in (*NAMES, "GROUP_RANK", RUN_TOKEN):
        os.environ.pop(name, None)


def quiet_torch() -> None:
    """Keep torch's C++ warnings off the screen, unless one of torch's own switches asks for them.

    Where a rank dies, c10d and its store print the C++ frames of every other rank, above the line that explains it.
    torch reads the variable while it is imported.
    """
    if not any(name in os.environ for name in TORCH_SWITCHES):
        os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"


def launcher_environment() -> dict[str, str]:
    """RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE from torchrun or srun, or those of a single process.

    srun's SLURM_* variables are copied to torch's names, the first host of the step is the master, and its port is the
    step's own. Raises UserError where the variables contradict each other.
    """
    if "WORLD_SIZE" not in os.environ and int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        os.environ.update(_of_step(os.environ))
        os.environ.setdefault("MASTER_ADDR", _first_host(os.environ["SLURM_STEP_NODELIST"]))
        os.environ.setdefault("MASTER_PORT", str(_port_of_step(os.environ)))
    defaults = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    given = {name: os.environ.get(name, default) for name, default in defaults.items()}
    _check(given)
    return given


def node_name() -> str:
    """The name of this node: Slurm's, or the host's with the number that torchrun gave to the node."""
    if "SLURMD_NODENAME" in os.environ and RUN_TOKEN in os.environ:
        return os.environ["SLURMD_NODENAME"]
    host = socket.gethostname()
    return f"{host} (node {os.environ['GROUP_RANK']})" if "GROUP_RANK" in os.environ else host


def started_by() -> str:
    """The scheduler's job that this process belongs to, in words for messages: " of Slurm job 41"; or nothing."""
    job = os.environ.get("SLURM_JOB_ID")
    return f" of Slurm job {job}" if job else ""


def _of_step(slurm: Mapping[str, str]) -> dict[str, str]:
    counts = _tasks_per_node(slurm["SLURM_STEP_TASKS_PER_NODE"])
    node = int(slurm.get("SLURM_NODEID", "0"))
    return {
        "RANK": slurm["SLURM_PROCID"], "WORLD_SIZE": slurm["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": slurm["SLURM_LOCALID"], "LOCAL_WORLD_SIZE": str(counts[min(node, len(counts) - 1)]),
        RUN_TOKEN: "Slurm job {SLURM_JOB_ID}, step {}".format(slurm.get("SLURM_STEP_ID", "0"), **slurm),
    }  # fmt: skip


def _tasks_per_node(text: str) -> list[int]:
    """The tasks of each node of a step: "2,1(x2)" -> [2, 1, 1]."""
    counts: list[int] = []
    for count, _, times in re.findall(r"(\d+)(\(x(\d+)\))?", text):
        counts += [int(count)] * int(times or 1)
    return counts


def _port_of_step(slurm: Mapping[str, str]) -> int:
    """A port that neighbouring jobs and the steps of one job do not share."""
    job, step = int(slurm["SLURM_JOB_ID"]), int(slurm.get("SLURM_STEP_ID", "0"))
    return _PORTS[(31 * job + step % 31) % len(_PORTS)]


def _check(given: Mapping[str, str]) -> None:
    listed = " ".join(f"{name}={value}" for name, value in given.items())
    remedy = "start all ranks with torchrun, launch/torchrun.sh or srun, or unset WORLD_SIZE (docs/training.md)"
    if "WORLD_SIZE" in os.environ and given["WORLD_SIZE"] != "1" and "RANK" not in os.environ:
        raise UserError(
            f"WORLD_SIZE={given['WORLD_SIZE']} says that a launcher started this process as one of several ranks, but "
            f"RANK is not set; {remedy}"
        )
    for name, value in given.items():
        if not value.isdigit():
            raise UserError(f"{name}={value!r} is not a whole number; {remedy}")
    rank, world, local, local_world = (int(given[name]) for name in NAMES)
    if rank >= max(world, 1) or ("LOCAL_WORLD_SIZE" in os.environ and (local >= local_world or local_world > world)):
        raise UserError(f"{listed} contradict each other: a rank is below the size of its world; {remedy}")


def _first_host(nodes: str) -> str:
    """The first host of Slurm's list: `node[03-05,9]-ib` -> `node03-ib`; `r[1-2]n[3-4]` -> `r1n3`; `a,b` -> `a`."""
    return re.sub(r"\[([^],-]*)[^]]*\]", r"\1", nodes).split(",")[0]
