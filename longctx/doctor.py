"""`longctx doctor`: report the machine, the installed packages, and which attention kernels can serve."""

from __future__ import annotations

import os
import platform
import re
import shutil
from importlib.metadata import PackageNotFoundError, requires
from typing import Any

from longctx import console
from longctx.config.doctor import DoctorConfig
from longctx.host_memory import host_memory
from longctx.versions import installed

_EVERYTHING = "everything"
# The first two are built from source; `longctx import` alone needs the third.
_UNDECLARED = {"flash-attn": "gpu", "flash-attn-3": "gpu", "gguf": "import"}


def run(config: DoctorConfig) -> int:
    """Print the report; returns 0."""
    found = report(config)
    if config.format == "json":
        console.emit_json(found)
    else:
        console.emit(_tables(found))
    return 0


def report(config: DoctorConfig) -> dict[str, Any]:
    """Return the report as plain values.

    machine: python, cores, memory in GiB that this process may use, devices. packages: {name: version, or None if not
    installed}. backends: of process groups. kernels: {name: reasons why it cannot serve}, where a GPU has tried each.
    kernel: the one that would be chosen. element_wise: whose operators would do that work, and why not liger-kernel's.
    tools: {name: path or None}.
    """
    import torch
    import torch.distributed as dist

    from longctx.attention.kernels import choose, explain, this_machine

    problem = this_machine(config.head_dim, config.heads, config.kv_heads)
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "machine": {
            "python": platform.python_version(),
            "cores": len(os.sched_getaffinity(0)),
            "memory_gib": round(host_memory() / 2**30, 1),
            "devices": devices or ["cpu"],
        },
        "packages": {name: installed(name) for name in declared_packages()},
        "backends": {"gloo": dist.is_gloo_available(), "nccl": dist.is_nccl_available()},
        "kernels": explain(problem, tried=True),
        "kernel": choose(problem).name,
        "element_wise": _element_wise(config) if devices else "torch (a CPU)",
        "tools": {name: shutil.which(name) for name in ("ip", "tc", "srun", "nvidia-smi")},
    }


def _element_wise(config: DoctorConfig) -> str:
    """Who does the element-wise work of a model with these heads on the first GPU."""
    import torch

    from longctx.config.model import InitConfig, MemoryConfig
    from longctx.model import LossModel, init_from
    from longctx.model.operators import against_liger

    width = config.heads * config.head_dim
    shape = InitConfig(layers=1, hidden=width, heads=config.heads, kv_heads=config.kv_heads, ffn=4 * width, vocab=32000)
    device = torch.device("cuda", 0)
    with device:
        model = LossModel(init_from(shape, dtype="bfloat16"), MemoryConfig())
    reason = against_liger(model.model.get_submodule("model"), device)
    return f"torch ({reason})" if reason else "liger-kernel"


def declared_packages() -> dict[str, str]:
    """Return {package: use} as declared in pyproject.toml; the use: `everything`, the extra, or the verb."""
    found = {"longctx": _EVERYTHING}
    try:
        declared = requires("longctx") or []
    except PackageNotFoundError:  # a checkout on the path that is not installed
        declared = ["torch", "transformers"]
    for line in declared:
        name = re.split(r"[^\w.-]", line, maxsplit=1)[0]
        extra = re.search(r"extra == ['\"](\w+)['\"]", line)
        if extra is None or extra[1] in ("train", "gpu"):
            found[name] = extra[1] if extra else _EVERYTHING
    return found | _UNDECLARED


def _tables(found: dict[str, Any]) -> object:
    from rich.console import Group
    from rich.table import Table

    machine = Table(title="this machine", show_header=False)
    for name, value in found["machine"].items():
        machine.add_row(name, ", ".join(value) if isinstance(value, list) else str(value))
    machine.add_row("element-wise work", found["element_wise"])
    for name, there in {**found["backends"], **found["tools"]}.items():
        machine.add_row(name, str(there) if there else "not found")
    packages = Table("package", "version", "for", title="packages")
    purpose = declared_packages()
    for name, release in found["packages"].items():
        packages.add_row(name, release or "not installed", purpose[name])
    kernels = Table("kernel", "", title=f"attention kernels in order of preference; chosen: {found['kernel']}")
    for name, reasons in found["kernels"].items():
        kernels.add_row(name, "; ".join(reasons) or "can serve")
    return Group(machine, packages, kernels)
