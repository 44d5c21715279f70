"""One rank of `longctx bench hierarchy`: time every schedule in turn, without limits and over limited links.

launch/virtual_cluster.sh starts it once per rank with torchrun's environment. SPEC is a JSON file that the parent
writes; rank 0 writes RESULT. The time of a run goes from a common start to the end of the slowest rank. The forward
time is taken within the same run, so that forward + backward needs no second forward.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist

from longctx import ContextParallel, context_attention
from longctx.bench.cluster import ENVIRONMENT, set_rate
from longctx.distributed import ranks as worlds


def main(spec_file: str, result_file: str) -> int:
    """Measure the cases in `spec_file`; rank 0 writes the samples, the byte counts and the links' counters."""
    spec = json.loads(Path(spec_file).read_text(encoding="utf-8"))
    rank = worlds.start("cpu").rank
    groups = {schedule: _group(spec, schedule) for schedule in spec["schedules"]}
    measured: dict[str, Any] = {"seconds": {}, "bytes": {}, "links": {}}
    for rate in spec["rates"]:
        _limit(rate)
        for turn in range(spec["repeats"] + (rate == "none")):
            for schedule in spec["schedules"]:
                if turn >= _repeats(spec, schedule) + (rate == "none"):
                    continue
                sample = _measure(spec, groups[schedule])
                measured["bytes"][schedule] = sample["bytes"]
                if rate == "none" and turn == 0:
                    continue  # the first turn warms caches and allocators
                measured["seconds"].setdefault(rate, {}).setdefault(schedule, []).append(sample["seconds"])
                measured["links"].setdefault(rate, {}).setdefault(schedule, []).append(sample["links"])
                if rank == 0:
                    _tell({"rate": rate, "schedule": schedule, "turn": turn, **sample["seconds"]})
    if rank == 0:
        Path(result_file).write_text(json.dumps(measured), encoding="utf-8")
    dist.barrier()
    for group in groups.values():
        group.close()
    worlds.stop()
    return 0


def _repeats(spec: dict[str, Any], schedule: str) -> int:
    return spec["flat_repeats"] if schedule == "flat_ring" else spec["repeats"]


def _limit(rate: str) -> None:
    """Change the rate of all links of the cluster while every rank waits."""
    dist.barrier()
    if dist.get_rank() == 0:
        set_rate(os.environ[ENVIRONMENT], rate)
    dist.barrier()


def _group(spec: dict[str, Any], schedule: Any) -> ContextParallel:
    ulysses = spec["ulysses"] if schedule == "ulysses_ring" else 1
    return ContextParallel.from_world(nodes=spec["nodes"], schedule=schedule, ulysses=ulysses)


def _measure(spec: dict[str, Any], cp: ContextParallel) -> dict[str, Any]:
    """Measure one run.

    Returns seconds: {pass: time of the slowest rank}; bytes: for each rank {pass: {level: bytes sent}}; links: the
    bytes that the kernel counted on each rank's link.
    """
    layout = cp.layout(seq_len=spec["seq_len"], documents=None, kind="zigzag")
    local = spec["seq_len"] // cp.size
    q, k, v = (
        torch.randn(1, heads, local, spec["head_dim"], requires_grad=spec["backward"])
        for heads in (spec["heads"], spec["kv_heads"], spec["kv_heads"])
    )
    cp.bytes.reset()
    before = _sent_by_link()
    dist.barrier()
    start = time.perf_counter()
    out = cast(torch.Tensor, context_attention(q, k, v, layout))
    seconds = {"forward": time.perf_counter() - start}
    counted = {"forward": dict(cp.bytes.per_level())}
    if spec["backward"]:
        out.backward(torch.ones_like(out))
        seconds["forward_backward"] = time.perf_counter() - start
        counted["forward_backward"] = dict(cp.bytes.per_level())
    dist.barrier()
    names = sorted(seconds)
    slowest = torch.tensor([seconds[name] for name in names], dtype=torch.float64)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    everyone: list[Any] = [None] * cp.size
    dist.all_gather_object(everyone, (counted, _sent_by_link() - before))
    return {
        "seconds": dict(zip(names, slowest.tolist(), strict=True)),
        "bytes": [item[0] for item in everyone],
        "links": [item[1] for item in everyone],
    }


def _sent_by_link() -> int:
    """Return the kernel's count of bytes sent over this rank's link, headers included."""
    name = os.environ["GLOO_SOCKET_IFNAME"]
    return int(Path(f"/sys/class/net/{name}/statistics/tx_bytes").read_text(encoding="utf-8"))


def _tell(line: dict[str, Any]) -> None:
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:3]))
