"""`longctx submit`: checks a training command as a run would, renders launch/slurm.sbatch for it and calls sbatch.

Without a GPU at hand the devices' memory is that of `hardware`. With `launch.per_stage` there is a job for each stage,
of as many nodes as it shall have; each begins once the one before has ended with 0.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

from longctx import console
from longctx.config.submit import SubmitConfig
from longctx.config.train import LaunchConfig, TrainConfig
from longctx.errors import UserError

if TYPE_CHECKING:
    from longctx.curriculum import Stage
    from longctx.decide import Machines

# What the variables do that people set for NCCL and the fabric below it, for the comment above each.
EXPLAINED = {
    "NCCL_DEBUG": "WARN says what NCCL dislikes; INFO also which network and which channels it chose",
    "NCCL_SOCKET_IFNAME": "the interface through which NCCL's ranks first meet; = before the name takes it alone",
    "GLOO_SOCKET_IFNAME": "the same for the small messages that control a run",
    "NCCL_IB_HCA": "the InfiniBand or RoCE cards to use, by the beginning of their names",
    "NCCL_IB_GID_INDEX": "the entry of a RoCE card's address table; 3 is RoCE v2 over IPv4 on most machines",
    "NCCL_IB_DISABLE": "1 goes through sockets: slow, but tells whether InfiniBand is at fault",
    "NCCL_NET_GDR_LEVEL": "how far apart GPU and card may lie for transfers that pass host memory by",
    "NCCL_CROSS_NIC": "0 keeps a ring on cards of one rail, 1 lets it cross rails",
    "NCCL_TOPO_FILE": "what is connected to what, where a virtual machine hides it",
    "FI_PROVIDER": "the libfabric provider: efa on AWS, cxi on Slingshot",
    "HF_HOME": "the cache of models and data, which every node must see",
    "HF_HUB_OFFLINE": "1 keeps to that cache: nodes without network do not wait for the hub",
    "OMP_NUM_THREADS": "CPU threads of each rank; without it the run divides the cores",
}


@dataclass(frozen=True)
class Job:
    """One call of sbatch: its name, its nodes, and the words of the training command."""

    name: str
    nodes: int
    words: tuple[str, ...]


def run(config: SubmitConfig, words: Sequence[str]) -> int:
    """Check the command, then print the scripts (`dry_run`) or submit them. words: the command line's.

    Raises UserError for what training would refuse, and with Slurm's own message where sbatch refuses.
    """
    stages = check(config)
    scripts = [(job, render(config, job)) for job in jobs_of(config, stages, training_words(words))]
    if config.dry_run:
        for _, script in scripts:
            console.emit_text(script)
        return 0
    before: str | None = None
    for job, script in scripts:
        path = Path(config.folder) / "submit" / f"{job.name}.sh"
        for folder in (path.parent, _logs(config)):  # sbatch makes none
            folder.mkdir(parents=True, exist_ok=True)
        path.write_text(script, encoding="utf-8")
        before = _sbatch(path, before)
        after = " after the one before" if len(scripts) > 1 and job is not scripts[0][0] else ""
        console.say(f"job {before}: {job.name} on {job.nodes} node{'s' * (job.nodes > 1)}{after}; {path}")
    return 0


def check(config: SubmitConfig) -> list[Stage]:
    """The stages, once everything is checked that training checks before its ranks start. Raises UserError."""
    from longctx.decide import Machines, planned_kernel
    from longctx.run.training import settled_for_adapter
    from longctx.run.what_follows import check_what_follows
    from longctx.shape import shape_of_model
    from longctx.train import checks
    from longctx.train.due import due
    from longctx.train.train import resolve_stages

    settled_config, launch = settled_for_adapter(config), config.launch
    stages = resolve_stages(settled_config)
    unknown = [name for name in launch.nodes_by_stage if name not in {stage.name for stage in stages}]
    if unknown:
        known = ", ".join(stage.name for stage in stages)
        raise UserError(f"launch.nodes_by_stage.{unknown[0]} is no stage of the curriculum; known: {known}")
    check_what_follows(settled_config)
    parts: list[tuple[Machines, list[Stage]]] = []
    for nodes in sorted({launch.nodes_by_stage.get(stage.name, launch.nodes) for stage in stages}):
        own = [stage for stage in stages if launch.nodes_by_stage.get(stage.name, launch.nodes) == nodes]
        parts.append((Machines(nodes * launch.ranks, launch.ranks), due(settled_config, own)))
        checks.check(settled_config, own, world=nodes * launch.ranks, local_world=launch.ranks)
    if launch.gpus_per_node and settled_config.engine.device != "cpu":
        shape = shape_of_model(settled_config.model)
        kernel = planned_kernel("cuda", settled_config.model, shape, config.hardware.capability)
        if "memory" not in config.accept:
            _check_memory(settled_config, parts, kernel, config.hardware.memory_gib)
    return stages


def _check_memory(config: TrainConfig, parts: list[tuple[Machines, list[Stage]]], kernel: str, gib: float) -> None:
    """Raise UserError where training, a side run or the evidence does not fit GPUs of `gib` GiB; config: a settled one.

    parts: the ranks of each job, and its stages.
    """
    from longctx.decide import Machines
    from longctx.planner.evidence import check_evidence_memory, needs_of
    from longctx.planner.remedies import GIB, DeviceLimits, check_memory
    from longctx.run.side_config import side_config
    from longctx.run.what_follows import named_as_asked
    from longctx.shape import shape_of_model
    from longctx.train.train import resolve_stages

    shape, asked = shape_of_model(config.model), config.after_training
    if asked.evidence is not None:
        check_evidence_memory(needs_of(asked.evidence, shape, config.model.dtype, "cuda", 1), gib * GIB, "cuda")
    for machines, stages in parts:
        check_memory(stages, shape, config, DeviceLimits(machines, "cuda", kernel, gib * GIB))
    for name, (key, side) in asked.side_runs.items():
        own = side_config(config, Path(config.folder), name, side)
        machines = Machines(own.launch.nproc, own.launch.nproc)
        with named_as_asked(name, key):
            check_memory(resolve_stages(own), shape, own, DeviceLimits(machines, "cuda", kernel, gib * GIB))


def training_words(words: Sequence[str]) -> tuple[str, ...]:
    """The words of the command line that `longctx train` knows: those of the job itself left out."""
    known = {f"launch.{field.name}" for field in fields(LaunchConfig)}  # type: ignore[arg-type]
    kept = []
    for word in words:
        key = word.lstrip("+~").partition("=")[0]
        own = key in ("dry_run", "launch", "hardware") or key.startswith("hardware.")
        if not own and (not key.startswith("launch.") or key in known):
            kept.append(word)
    return tuple(kept)


def jobs_of(config: SubmitConfig, stages: Sequence[Stage], words: tuple[str, ...]) -> list[Job]:
    """One job, or one for each stage that is not trained, which ends after it (launch.until)."""
    from longctx.train.due import due

    launch = config.launch
    if not launch.per_stage:
        return [Job(config.name, launch.nodes, words)]
    left = due(config, stages) or stages[-1:]  # what follows training may be left
    return [
        Job(
            f"{config.name}-{s.name}",
            launch.nodes_by_stage.get(s.name, launch.nodes),
            (*words, f"launch.until={s.name}"),
        )
        for s in left
    ]


def render(config: SubmitConfig, job: Job) -> str:
    """The script of a job: the options of sbatch, the settings of its cluster, and the body of launch/slurm.sbatch."""
    launch = config.launch
    gpus = [f"--gpus-per-node={launch.gpus_per_node}"] if launch.gpus_per_node else []
    named = {
        "account": launch.account,
        "partition": launch.partition,
        "qos": launch.qos,
        "constraint": launch.constraint,
    }
    options = [
        f"--job-name={job.name}", f"--nodes={job.nodes}", *([f"--gres={launch.gres}"] if launch.gres else gpus),
        f"--ntasks-per-node={launch.ranks}", f"--cpus-per-task={launch.cpus_per_task}", f"--time={launch.time}",
        *(f"--{name}={value}" for name, value in named.items() if value),
        f"--signal=B:USR1@{launch.lead_seconds}", "--requeue", f"--output={_logs(config)}/%x-%j.log",
        "--open-mode=append",
    ]  # fmt: skip
    options = [*map(shlex.quote, options), *launch.sbatch]  # sbatch reads quotes there as a shell does
    steps = [f"--output={_logs(config)}/%x-%j-rank%t.log", "--open-mode=append"] if launch.rank_logs else []
    if launch.container:
        steps += [f"--container-image={launch.container}"]
        steps += [f"--container-mounts={','.join(launch.mounts)}"] if launch.mounts else []
    lines = [
        "#!/usr/bin/env bash",
        f"# {job.name}: made by `longctx submit`; docs/launching.md says what each part does.",
    ]
    lines += [f"#SBATCH {option}" for option in options]
    lines += [f"cd {shlex.quote(str(Path.cwd()))} || exit 1", *launch.setup]
    for name, value in launch.environment.items():
        lines += [f"# {EXPLAINED[name]}"] if name in EXPLAINED else []
        lines += [f"export {name}={shlex.quote(value)}"]
    if steps:
        lines += [f"export SRUN_OPTIONS={shlex.quote(shlex.join(steps))}"]
    if not launch.container:
        lines += [f"export PYTHON=${{PYTHON:-{shlex.quote(sys.executable)}}}"]
    lines += [f"export LONGCTX_SIGNAL_LEAD={launch.lead_seconds}", f"set -- {shlex.join(job.words)}"]
    return "\n".join(lines) + "\n" + _body()


def _logs(config: SubmitConfig) -> Path:
    """The folder of the logs."""
    return Path(config.folder).resolve() / "logs"


def _body() -> str:
    """launch/slurm.sbatch after its options, at the top of a checkout or inside the wheel."""
    package = Path(__file__).resolve().parent.parent
    inside = package / "launch" / "slurm.sbatch"
    text = (inside if inside.is_file() else package.parent / "launch" / "slurm.sbatch").read_text(encoding="utf-8")
    head, _, body = text.rpartition("\n#SBATCH ")
    return body.partition("\n")[2] if head else text


def _sbatch(path: Path, after: str | None) -> str:
    """Submit a script; returns the job's number. after: the job that must have ended with 0."""
    words = ["sbatch", "--parsable", *([f"--dependency=afterok:{after}"] if after else []), str(path)]
    try:
        done = subprocess.run(words, capture_output=True, encoding="utf-8", errors="replace")
    except FileNotFoundError:
        raise UserError(
            "sbatch is not on this machine, so the job is not submitted; run this on the cluster's login node, or take "
            f"the script {path} there (dry_run=true prints it)"
        ) from None
    if done.returncode:
        raise UserError(
            f"Slurm refuses the job: {' '.join(done.stderr.split())}; change what it names (launch.partition, "
            f"launch.account, launch.time, ...; configs/launch), or give launch.sbatch=[...] ({path})"
        )
    return done.stdout.strip().partition(";")[0]
