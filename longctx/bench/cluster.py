"""Ranks on the virtual cluster: starts launch/virtual_cluster.sh, follows what its ranks print, and ends it.

The script owns the namespaces and removes them however this process ends: its standard input is a pipe
from here, and when that closes (a return, an exception, even SIGKILL) the ranks are ended and the network
is taken down.
"""

from __future__ import annotations

import os
import queue
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from longctx.errors import RunFailed, UserError

ENVIRONMENT = "LONGCTX_VIRTUAL_CLUSTER"


def script() -> Path:
    """launch/virtual_cluster.sh of this checkout."""
    return Path(__file__).resolve().parents[2] / "launch" / "virtual_cluster.sh"


def missing() -> str | None:
    """Why the virtual cluster cannot be started here, or None."""
    if not script().is_file():
        return f"{script()} is not there; the virtual cluster needs a checkout of the repository"
    for tool in ("ip", "tc"):
        if shutil.which(tool) is None:
            return f"the command `{tool}` is missing; install iproute2 (apt-get install iproute2)"
    if os.geteuid() != 0:
        return "making network namespaces needs root; run it as `sudo longctx bench hierarchy ...`"
    return None


def require() -> None:
    """UserError that says what is missing."""
    reason = missing()
    if reason:
        raise UserError(f"bench hierarchy cannot start its virtual cluster: {reason}")


def set_rate(cluster: str, rate: str) -> None:
    """Hold every link of a running cluster to `rate` (tc's notation), or lift the limit with "none"."""
    done = subprocess.run([str(script()), "rate", cluster, rate], capture_output=True, text=True)
    if done.returncode:
        raise RunFailed(done.stderr.strip() or f"could not set rate={rate} on {cluster}")


def run(
    nodes: int,
    ranks: int,
    command: Sequence[str],
    *,
    timeout: float,
    heard: Callable[[str], None],
    threads: int = 1,
) -> None:
    """Run `command` once per rank with torchrun's environment and wait for all of them.

    heard: called with each line the ranks print on standard output. timeout: seconds.
    Raises UserError when the cluster cannot be made, RunFailed when a rank fails or time runs out.
    """
    require()
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "TORCH_CPP_LOG_LEVEL": "ERROR"}
    launch = [str(script()), "run", f"nodes={nodes}", f"ranks={ranks}", "until=stdin", "--", *command]
    process = subprocess.Popen(
        launch,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    lines: queue.Queue[str | None] = queue.Queue()
    errors: list[str] = []
    readers = [
        threading.Thread(target=_drain, args=(process.stdout, lines.put), daemon=True),
        threading.Thread(target=_drain, args=(process.stderr, lambda line: line and errors.append(line)), daemon=True),
    ]
    for reader in readers:
        reader.start()
    deadline = time.monotonic() + timeout
    try:
        while (line := lines.get(timeout=max(0.1, deadline - time.monotonic()))) is not None:
            heard(line)
        status = process.wait(timeout=30)
    except queue.Empty:
        raise RunFailed(f"the ranks were not done after {timeout:.0f} s; raise timeout_seconds") from None
    finally:
        _end(process)
    readers[1].join(timeout=5)
    if status:
        text = "\n".join(_first_failure(errors))
        if status == 2:
            raise UserError(text)
        raise RunFailed(f"a rank of the virtual cluster failed (status {status}):\n{text}")


def _first_failure(errors: list[str]) -> list[str]:
    """The last lines of whichever rank failed first: torch marks them [rankN]; the others only lost a peer."""
    first = next((line.split("]")[0] for line in errors if line.startswith("[rank")), "")
    return [line for line in errors if line.startswith(first)][-12:]


def _drain(stream: object, put: Callable[[str | None], object]) -> None:
    for line in stream:  # type: ignore[attr-defined]
        put(line.rstrip("\n"))
    put(None)


def _end(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.close()
    try:
        process.wait(timeout=20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
