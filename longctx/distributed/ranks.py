"""The world as one rank sees it: rank, world, device, and the few small collectives that control a run.

Every run has a process group, even a run of one process, so no other module asks whether the run is distributed.
`agree` makes all ranks raise the error of one.
"""

from __future__ import annotations

import itertools
import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist

from longctx.distributed import meeting
from longctx.distributed.launcher import NAMES, launcher_environment, node_name
from longctx.distributed.local import ONE_GPU, STORE_FD
from longctx.distributed.placement import Introduction, by_node, cores
from longctx.errors import RunFailed, UserError, first_line, refused_by_system
from longctx.versions import check_versions

MEETING_SECONDS = 600.0


@dataclass
class Ranks:
    """One rank's view of the world; local_world ranks run on its node.

    places: what each rank said of itself when the ranks met; empty where this process made the world otherwise.
    """

    rank: int
    world: int
    local_rank: int
    local_world: int
    device: torch.device
    control: dist.ProcessGroup | None = field(default=None, repr=False)
    places: Sequence[Introduction] = field(default=(), repr=False)
    _barriers: int = field(default=0, repr=False)

    @property
    def first(self) -> bool:
        return self.rank == 0

    @property
    def nodes(self) -> list[str]:
        """The names of the nodes, in the order of their ranks; empty where they are unknown."""
        return list(by_node(self.places))

    def threads(self) -> int:
        """The CPU threads of this rank: its share of the cores that it may use."""
        if self.places and self.places[self.rank].cpus:
            return cores(self.places, self.rank)
        return max(1, len(os.sched_getaffinity(0)) // self.local_world)

    def barrier(self) -> None:
        """Wait until every rank has called this, without a timeout.

        One rank's work (tokenizing, an export, an adapter) may take longer than any collective's timeout. The launcher
        handles dead ranks; the watchdog handles hung ones.
        """
        if self.world == 1:
            return
        store = cast(Any, dist.distributed_c10d._get_default_store())
        self._barriers += 1
        key, pause = f"barrier/{self._barriers}", 0.001
        store.add(key, 1)
        while store.add(key, 0) < self.world:
            time.sleep(pause)
            pause = min(2 * pause, 1.0)

    def gather(self, value: Any) -> list[Any]:
        """Return the values of all ranks, in rank order, on every rank."""
        if self.world == 1:
            return [value]
        out: list[Any] = [None] * self.world
        dist.all_gather_object(out, value, group=self.control)
        return out

    def broadcast(self, value: Any) -> Any:
        """Return rank 0's `value` on every rank."""
        if self.world == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]

    def sum(self, values: list[float]) -> list[float]:
        """Return the element-wise sum over ranks in float64, in one small message."""
        if self.world == 1:
            return list(values)
        packed = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(packed, group=self.control)
        return packed.tolist()

    def any(self, flag: bool) -> bool:
        return self.sum([float(flag)])[0] > 0

    @contextmanager
    def agree(self, what: str) -> Iterator[None]:
        """Run the body on every rank; if it fails on one, all ranks raise that rank's error, and none waits forever.

        The body may contain a collective only if every rank reaches it even when another rank fails.
        """
        error: Exception | None = None
        try:
            yield
        except (UserError, RunFailed, OSError, ValueError) as raised:
            error = raised
        self.barrier()
        # The bare text of a full disk names no remedy; a UserError may quote the system's text.
        words = error and ((isinstance(error, OSError) and refused_by_system(error)) or str(error))
        reports = self.gather(None if error is None else (isinstance(error, UserError), words))
        failed = [(rank, *report) for rank, report in enumerate(reports) if report]
        if failed:
            rank, by_user, text = next((report for report in failed if report[2]), failed[0])  # one with a message
            if by_user:
                raise UserError(text) from error
            raise RunFailed(f"{what} failed on rank {rank}: {text}") from error


def choose_device(wanted: str, local_rank: int, key: str = "engine.device") -> torch.device:
    """The device of this rank; raises UserError, which names `key`, when CUDA is asked for and there is none."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError(f"{key}=cuda, but this machine shows no CUDA device; use {key}=cpu or auto")
    if wanted == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def may_share_devices() -> bool:
    """Whether NCCL is told to take several ranks on one device, as launch/one_gpu.sh does.

    It compares hosts by NCCL_HOSTID, and from 2.30 on NCCL_MULTI_RANK_GPU_ENABLE=1 allows it.
    """
    return "NCCL_HOSTID" in os.environ or os.environ.get("NCCL_MULTI_RANK_GPU_ENABLE") == "1"


def check_shared_devices(devices: Sequence[tuple[str, str]]) -> None:
    """Raise UserError where ranks share a device and NCCL is not told to allow it.

    devices: the node and the UUID of each rank's device. A launcher may show each rank only its own (`srun
    --gpus-per-task=1`), so neither numbers nor counts of devices tell. NCCL itself would end the run at its first
    transfer with "Duplicate GPU detected".
    """
    if len(set(devices)) == len(devices) or may_share_devices():
        return
    shared = next(node for (node, _), count in Counter(devices).items() if count > 1)
    ranks = [device for node, device in devices if node == shared]
    count = len(set(ranks))
    raise UserError(
        f"{len(ranks)} ranks on {shared} and {count} CUDA device{'s' * (count != 1)}: NCCL refuses two ranks on "
        "one device (Duplicate GPU detected); take as many ranks as devices (launch.nproc, or torchrun's "
        "--nproc-per-node), engine.device=cpu, or, to try several ranks on one GPU, start the command with "
        f"`launch/one_gpu.sh {len(ranks)} COMMAND` (docs/training.md)"
    )


def shared_gpu(rank: int) -> dict[str, str]:
    """The environment in which NCCL takes several ranks on one GPU, as launch/one_gpu.sh sets it."""
    return {
        "NCCL_HOSTID": f"{ONE_GPU}{rank}", "NCCL_NET": "Socket", "NCCL_SOCKET_IFNAME": "lo",
        "NCCL_IB_DISABLE": "1", "NCCL_NVLS_ENABLE": "0", "GLOO_SOCKET_IFNAME": "lo",
    }  # fmt: skip


def start(
    device: str = "auto",
    timeout_seconds: float = 1800.0,
    *,
    meeting_seconds: float = MEETING_SECONDS,
    key: str = "engine.device",
) -> Ranks:
    """Join the other ranks (unless joined already) and return this rank's view of the world.

    device: auto, cuda or cpu. timeout_seconds: how long a collective waits for a late rank. meeting_seconds: how long
    the ranks wait for each other at the start. key: the config's key that names the device. Raises UserError when
    device=cuda and there is none, when ranks share a device (unless launch/one_gpu.sh started them), and when a
    package is too old.
    """
    check_versions()
    env = launcher_environment()
    chosen = choose_device(device, int(env["LOCAL_RANK"]), key)
    join(int(env["RANK"]), int(env["WORLD_SIZE"]), timeout_seconds, meeting_seconds=meeting_seconds)
    env = launcher_environment()  # the meeting may have numbered the ranks anew
    rank, world, local_rank, local_world = (int(env[name]) for name in NAMES)
    chosen = choose_device(device, local_rank)
    timeout = timedelta(seconds=timeout_seconds)
    _set_timeout(timeout)
    control: Any = dist.new_group(backend="gloo", timeout=timeout) if chosen.type == "cuda" and world > 1 else None
    found = meeting.met()
    places = found.ranks if found is not None and world > 1 else ()
    ranks = Ranks(rank, world, local_rank, local_world, chosen, control, places)
    if chosen.type == "cuda" and world > 1:
        uuid = str(torch.cuda.get_device_properties(chosen).uuid)
        check_shared_devices(ranks.gather((places[rank].node if places else node_name(), uuid)))
    return ranks


def alone(device: str = "auto") -> Ranks:
    """A world of this process only, without a process group."""
    return Ranks(0, 1, 0, 1, choose_device(device, 0))


def join(
    rank: int,
    world: int,
    timeout_seconds: float,
    *,
    meeting_seconds: float = MEETING_SECONDS,
    command: Sequence[str] | None = None,
) -> None:
    """Make the process group that the launcher's environment describes, or one of a single process.

    The ranks of a launcher meet first, see `longctx.distributed.meeting`; command: the command line, which must be the
    same for all of them. Raises UserError where they cannot run together, and NotMet where some do not come.
    """
    if dist.is_initialized():
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    timeout = timedelta(seconds=timeout_seconds)
    if world == 1:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
        return
    found = meeting.met()
    if found is not None:  # the ranks have left their group and make another
        store = dist.PrefixStore(f"group {next(_groups)}", found.store)
        dist.init_process_group(backend, store=store, rank=found.rank, world_size=world, timeout=timeout)
        return
    if STORE_FD in os.environ:  # started by longctx.distributed.local, which holds the port
        store = _launchers_store(world, timeout)
        meeting.joined(store, rank, world)
    else:
        found = meeting.meet(rank, world, seconds=meeting_seconds, command=command)
        store, rank = found.store, found.rank
    try:
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)
    except dist.DistNetworkError as error:
        raise RunFailed(
            f"rank {rank} of {world} met the others and could not connect to them: {first_line(error)}; check that "
            "every node can be reached from the others, and on which network (GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME)"
        ) from None


_groups = itertools.count(1)


def _launchers_store(world: int, timeout: timedelta) -> dist.Store:
    socket = os.environ.pop(STORE_FD)
    return dist.TCPStore(
        os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), world, is_master=bool(socket), timeout=timeout,
        master_listen_fd=int(socket) if socket else None,
    )  # fmt: skip


def _set_timeout(timeout: timedelta) -> None:
    """Set the timeout of the world's collectives; ranks under a launcher join the world before they know it."""
    if dist.get_world_size() > 1:
        cast(Any, dist.distributed_c10d)._set_pg_timeout(timeout, dist.group.WORLD)


def stop() -> None:
    from longctx.distributed.transport import leave_world

    leave_world()
