"""`longctx doctor`: what this machine offers, what is installed, and why a kernel would or would not serve."""

from __future__ import annotations

import os
import platform
import shutil
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from longctx import console
from longctx.config.doctor import DoctorConfig

_LIGHT = ("torch", "transformers", "hydra-core", "peft", "safetensors")
_TRAIN = ("accelerate", "deepspeed", "datasets", "wandb")
_GPU = ("flash-attn", "flash-attn-3", "ring-flash-attn", "liger-kernel")


def run(config: DoctorConfig) -> int:
    """Print the findings; 0 always, for nothing here is the user's mistake."""
    found = findings(config)
    if config.format == "json":
        console.emit_json(found)
    else:
        console.emit(_tables(found))
    return 0


def findings(config: DoctorConfig) -> dict[str, Any]:
    """Machine, packages (None: not installed), process-group backends, kernels with their reasons, tools."""
    import torch
    import torch.distributed as dist

    from longctx.attention.kernels import choose, explain, this_machine

    problem = this_machine(config.head_dim, config.heads, config.kv_heads)
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "machine": {
            "python": platform.python_version(),
            "cores": len(os.sched_getaffinity(0)),
            "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
            "devices": devices or ["cpu"],
        },
        "packages": {name: _version(name) for name in (*_LIGHT, *_TRAIN, *_GPU)},
        "backends": {"gloo": dist.is_gloo_available(), "nccl": dist.is_nccl_available()},
        "kernels": explain(problem),
        "kernel": choose(problem).name,
        "tools": {name: shutil.which(name) for name in ("ip", "tc", "srun", "nvidia-smi")},
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _tables(found: dict[str, Any]) -> object:
    from rich.console import Group
    from rich.table import Table

    machine = Table(title="this machine", show_header=False)
    for name, value in found["machine"].items():
        machine.add_row(name, ", ".join(value) if isinstance(value, list) else str(value))
    for name, there in {**found["backends"], **found["tools"]}.items():
        machine.add_row(name, str(there) if there else "not here")
    packages = Table("package", "version", "for", title="packages")
    purpose = dict.fromkeys(_TRAIN, "train") | dict.fromkeys(_GPU, "gpu")
    for name, installed in found["packages"].items():
        packages.add_row(name, installed or "not installed", purpose.get(name, "everything"))
    kernels = Table("kernel", "", title=f"attention kernels in order of preference; chosen: {found['kernel']}")
    for name, reasons in found["kernels"].items():
        kernels.add_row(name, "; ".join(reasons) or "can serve")
    return Group(machine, packages, kernels)
