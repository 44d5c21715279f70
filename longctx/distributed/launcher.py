"""The environment that torchrun or srun gives to a rank, under torch's names; this module does not import torch."""

from __future__ import annotations

import os


def leave_launcher() -> None:
    """Remove the launcher's variables, so that this process is a world of its own and no rank of torchrun or srun."""
    for name in [name for name in os.environ if name.startswith("SLURM_STEP_")]:
        del os.environ[name]
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        os.environ.pop(name, None)


def launcher_environment() -> dict[str, str]:
    """RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE from torchrun or srun, or those of a single process.

    srun's SLURM_* variables are copied to torch's names, and the first host of the step is the master.
    """
    if "WORLD_SIZE" not in os.environ and int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        os.environ["RANK"] = os.environ["SLURM_PROCID"]
        os.environ["WORLD_SIZE"] = os.environ["SLURM_STEP_NUM_TASKS"]
        os.environ["LOCAL_RANK"] = os.environ["SLURM_LOCALID"]
        os.environ["LOCAL_WORLD_SIZE"] = os.environ["SLURM_STEP_TASKS_PER_NODE"].split("(")[0].split(",")[0]
        os.environ.setdefault("MASTER_ADDR", _first_host(os.environ["SLURM_STEP_NODELIST"]))
        os.environ.setdefault("MASTER_PORT", str(20000 + int(os.environ["SLURM_JOB_ID"]) % 20000))
    defaults = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    return {name: os.environ.get(name, default) for name, default in defaults.items()}


def _first_host(nodes: str) -> str:
    """The first host of Slurm's list: `node[03-05,9]` -> `node03`; `a,b` -> `a`."""
    head, bracket, rest = nodes.partition("[")
    if not bracket or "," in head:
        return head.split(",")[0]
    return head + rest.split("]")[0].split(",")[0].split("-")[0]
