"""`python -m longctx.run.node key=value ...`, which launch/torchrun.sh runs: starts and follows the ranks of one node.

NODES, NODE_RANK, HEAD, PORT and GPUS say how many nodes there are, which one this is, where they meet and how many
ranks this one starts. It needs no torch, so a mistake in the command line or in these variables is refused in a second
on every node. Signals are passed on to the ranks once those handle them.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from longctx import console, signals
from longctx.distributed.local import Node
from longctx.errors import RunFailed, UserError
from longctx.run.command import PREFLIGHT
from longctx.utf8 import use_utf8

PORT = 29500


def main(words: Sequence[str]) -> int:
    """Start the ranks of this node, again after a save on a signal; returns the run's exit status."""
    signals.catch(requeue=True)
    try:
        return _run(list(words))
    except UserError as error:
        print(f"longctx: {error}", file=sys.stderr, flush=True)
        return 2
    except RunFailed as error:
        print(f"longctx: {error}", file=sys.stderr, flush=True)
        return 1


def _run(words: list[str]) -> int:
    node, gpus = node_of(os.environ), ranks_here(os.environ)
    config = _config(words)
    from longctx.distributed.local import run_ranks
    from longctx.run.launch import run_ranks_and_explain
    from longctx.train.checks import cache_folder

    if words[:1] == [PREFLIGHT]:
        ended = run_ranks(gpus, 1, "longctx.run", *words, node=node)
        return abs(ended.first[1]) if ended.first else 0
    stop = signals.stop_request()
    for attempt in range(config.launch.requeues + 1):
        status = run_ranks_and_explain(
            config.launch, gpus, Path(config.folder), cache_folder(config), "longctx.run", *words, node=node
        )
        if status != signals.SAVED_AND_REQUEUE or stop.number in (signal.SIGTERM, signal.SIGHUP):
            return status
        stop.answered()
        if attempt < config.launch.requeues:
            console.last_line(f"saved; the ranks are started again ({attempt + 1} of launch.requeues)")
    return signals.SAVED_AND_REQUEUE


def _config(words: list[str]) -> Any:
    if words[:1] == ["--resolved"]:
        from longctx.train import runfolder

        return runfolder.read(Path(words[1]))
    from longctx.run.command import compose

    return compose(words)


def node_of(environment: Any) -> Node | None:
    """This machine's place among the nodes, None where it is the only one. Raises UserError for what is missing."""
    nodes = _number(environment, "NODES", 1)
    if nodes == 1:
        return None
    example = f"NODES={nodes} NODE_RANK=0 HEAD=10.0.0.1 launch/torchrun.sh ..."
    if nodes < 1:
        raise UserError(f"NODES={nodes} must be 1 or more (launch/torchrun.sh)")
    if not environment.get("NODE_RANK"):
        raise UserError(
            f"NODES={nodes} and NODE_RANK is not set: every node needs a number of its own, 0 to {nodes - 1}, as in "
            f"{example} (launch/torchrun.sh)"
        )
    number = _number(environment, "NODE_RANK", 0)
    if not 0 <= number < nodes:
        raise UserError(f"NODE_RANK={number} must be from 0 to {nodes - 1}, for NODES={nodes} (launch/torchrun.sh)")
    head = environment.get("HEAD", "")
    if not head:
        raise UserError(
            f"NODES={nodes} and HEAD is not set: every node needs the first one's address, as in {example} "
            "(launch/torchrun.sh)"
        )
    return Node(number, nodes, head, _number(environment, "PORT", PORT))


def ranks_here(environment: Any) -> int:
    """The ranks of this node: GPUS, or the GPUs that nvidia-smi lists, or one."""
    if environment.get("GPUS"):
        count = _number(environment, "GPUS", 1)
        if count < 1:
            raise UserError(f"GPUS={count} must be 1 or more ranks (launch/torchrun.sh)")
        return count
    if shutil.which("nvidia-smi") is None:
        return 1
    found = subprocess.run(
        ["nvidia-smi", "-L"], capture_output=True, encoding="utf-8", errors="replace", check=False
    ).stdout
    return max(1, sum(line.startswith("GPU ") for line in found.splitlines()))


def _number(environment: Any, name: str, default: int) -> int:
    text = environment.get(name) or str(default)
    if not text.isdigit():
        raise UserError(f"{name}={text!r} is not a whole number (launch/torchrun.sh)")
    return int(text)


if __name__ == "__main__":
    use_utf8()
    status = main(sys.argv[1:])
    signals.done()
    sys.exit(status)
