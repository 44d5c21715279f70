"""launch/one_gpu.sh: each rank's environment, statuses and signals; two ranks on one GPU by mistake are refused."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from longctx.distributed import local, transport
from longctx.distributed import ranks as ranks_module
from longctx.distributed.ranks import check_shared_devices, shared_gpu
from longctx.errors import UserError
from tests.dist.ranks import run_ranks

SCRIPT = Path(__file__).parents[2] / "launch" / "one_gpu.sh"


def started(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    names = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    return subprocess.run(
        [str(SCRIPT), *words], capture_output=True, text=True, timeout=60, env={**names, **environment}
    )


def test_every_rank_is_a_host_of_its_own_to_nccl():
    names = "RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE CUDA_VISIBLE_DEVICES NCCL_HOSTID NCCL_NET NCCL_SOCKET_IFNAME"
    names += " NCCL_IB_DISABLE NCCL_NVLS_ENABLE MASTER_ADDR"
    done = started(
        "2", "bash", "-c", "echo " + " ".join(f"${name}" for name in names.split()), CUDA_VISIBLE_DEVICES="3,4"
    )
    assert done.returncode == 0, done.stderr
    rest = "Socket lo 1 0 127.0.0.1"
    assert sorted(done.stdout.splitlines()) == [
        f"0 0 2 2 3 longctx-rank-0 {rest}",
        f"1 1 2 2 3 longctx-rank-1 {rest}",
    ]
    inside = set(shared_gpu(0)) - {"GLOO_SOCKET_IFNAME"}  # tests and benchmarks set what the script sets
    assert inside <= set(names.split())


@pytest.mark.parametrize(
    ("own", "hosts"),
    [("longctx-rank-0", ["longctx-rank-0", "longctx-rank-1"]), ("rack7", ["rack7", "rack7"]), (None, ["", ""])],
)
def test_a_side_run_that_a_rank_of_one_card_starts_has_hosts_of_its_own(tmp_path, monkeypatch, own, hosts):
    """Its ranks inherit that rank's environment; a host that a user names stays, or its ranks would leave NVLink."""
    monkeypatch.delenv("NCCL_HOSTID", raising=False)
    if own is not None:
        monkeypatch.setenv("NCCL_HOSTID", own)
    assert local.run_ranks(2, 1, "tests.dist.nccl_host", str(tmp_path)).statuses == [0, 0]
    assert [(tmp_path / str(rank)).read_text() for rank in range(2)] == hosts


def test_the_first_failing_rank_gives_the_status_and_the_others_end():
    began = time.monotonic()
    done = started("3", "bash", "-c", "if [ $RANK = 1 ]; then exit 75; fi; [ $RANK = 0 ] || sleep 0.5")
    assert done.returncode == 75
    assert time.monotonic() - began < 15
    assert started("2", "true").returncode == 0
    assert started("0", "true").returncode == started("two", "true").returncode == started("2").returncode == 2


def test_signals_reach_every_rank(tmp_path):
    body = f'trap "touch {tmp_path}/$RANK; exit 75" TERM; touch {tmp_path}/up$RANK; while :; do sleep 0.1; done'
    process = subprocess.Popen([str(SCRIPT), "2", "bash", "-c", body])
    try:
        deadline = time.monotonic() + 30
        while len(list(tmp_path.glob("up*"))) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 75
    finally:
        process.kill()
    assert (tmp_path / "0").exists()
    assert (tmp_path / "1").exists()


def test_training_becomes_the_rank_entry_of_a_launcher():
    done = started("2", sys.executable, "-m", "longctx", "train", "--help")
    assert done.returncode == 2
    assert "under torchrun and srun give overrides only" in done.stderr


def test_two_ranks_on_a_card_are_refused_before_nccl_does(monkeypatch):
    for name in ("NCCL_HOSTID", "NCCL_MULTI_RANK_GPU_ENABLE"):
        monkeypatch.delenv(name, raising=False)
    check_shared_devices([("a", "GPU-1"), ("a", "GPU-2"), ("b", "GPU-1"), ("b", "GPU-3")])
    shared = [("a", "GPU-1"), ("a", "GPU-2"), ("b", "GPU-3"), ("b", "GPU-3")]
    with pytest.raises(UserError, match=r"2 ranks on b and 1 CUDA device: .*launch/one_gpu.sh 2 COMMAND"):
        check_shared_devices(shared)
    monkeypatch.setenv("NCCL_MULTI_RANK_GPU_ENABLE", "1")
    check_shared_devices(shared)
    monkeypatch.delenv("NCCL_MULTI_RANK_GPU_ENABLE")
    monkeypatch.setenv("NCCL_HOSTID", "node0")
    check_shared_devices(shared)


def with_cards(rank, world, cards):
    """start() on a rank to which its launcher shows one card, cards[rank]."""
    made = SimpleNamespace(uuid=cards[rank])
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(ranks_module, "choose_device", lambda *_: torch.device("cuda", 0))
        patched.setattr(torch.cuda, "get_device_properties", lambda device: made)
        ranks_module.start()


def test_ranks_that_each_see_only_their_own_card_are_not_refused(tmp_path):
    """As under `srun --gpus-per-task=1`, where every task counts one device."""
    own, shared = ("GPU-1", "GPU-2"), ("GPU-1", "GPU-1")
    failures = run_ranks(2, with_cards, [own, shared], tmp_path / "store")
    assert own not in failures
    assert [text.count("2 ranks on ") for text in failures[shared]] == [1, 1]


def test_groups_are_made_on_a_torch_without_sort_ranks(monkeypatch):
    """torch 2.11 has no argument `sort_ranks`; a later torch is told to keep the parent's order."""
    made = dist.ProcessGroup(0, 1)

    def old(ranks=None, timeout=None, backend=None, pg_options=None, use_local_synchronization=False, group_desc=None,
            device_id=None):  # fmt: skip
        return made

    def new(ranks=None, timeout=None, backend=None, pg_options=None, use_local_synchronization=False, group_desc=None,
            device_id=None, sort_ranks=True):  # fmt: skip
        assert sort_ranks is False
        return made

    for function in (old, new):
        monkeypatch.setattr(dist, "new_group", function)
        assert transport._take(((0,), "test", None, "gloo")) is made
