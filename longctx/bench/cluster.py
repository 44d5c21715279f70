"""Run ranks on the virtual cluster: start launch/virtual_cluster.sh, read its output, and end it.

The script makes the network namespaces and removes them. Its standard input is a pipe from this process; when the pipe
closes, even because this process was killed, the script ends the ranks and removes the network.
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
    """Return the path of launch/virtual_cluster.sh in this checkout."""
    return Path(__file__).resolve().parents[2] / "launch" / "virtual_cluster.sh"


def missing() -> str | None:
    """Say why the virtual cluster cannot be started on this machine; None when it can."""
    if not script().is_file():
        return f"{script()} does not exist; the virtual cluster needs a checkout of the repository"
    for tool in ("ip", "tc"):
        if shutil.which(tool) is None:
            return f"the command `{tool}` is missing; install iproute2 (apt-get install iproute2)"
    if os.geteuid() != 0:
        return "making network namespaces needs root; run it as `sudo longctx bench hierarchy ...`"
    return None


def require() -> None:
    """Raise UserError when the virtual cluster cannot be started."""
    reason = missing()
    if reason:
        raise UserError(f"bench hierarchy cannot start its virtual cluster: {reason}")


def set_rate(cluster: str, rate: str) -> None:
    """Limit every link of a running cluster to `rate` (in tc's notation); "none" removes the limit."""
    done = subprocess.run(
        [str(script()), "rate", cluster, rate], capture_output=True, encoding="utf-8", errors="replace"
    )
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

    heard: called with each line that the ranks print on standard output. timeout: seconds. Raises UserError when the
    cluster cannot be made, and RunFailed when a rank fails or the time is over.
    """
    require()
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "TORCH_CPP_LOG_LEVEL": "ERROR"}
    launch = [str(script()), "run", f"nodes={nodes}", f"ranks={ranks}", "until=stdin", "--", *command]
    process = subprocess.Popen(
        launch,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        errors="replace",
        env=environment,
        encoding="utf-8",
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
        raise RunFailed(f"the ranks did not finish within {timeout:g} s; raise timeout_seconds") from None
    finally:
        _end(process)
    readers[1].join(timeout=5)
    if status:
        text = "\n".join(_first_failure(errors))
        if status == 2:
            raise UserError(text)
        raise RunFailed(f"a rank of the virtual cluster failed (status {status}):\n{text}")


def _first_failure(errors: list[str]) -> list[str]:
    """Return the last lines of the rank that failed first, which torch marks [rankN]; others only lost a peer."""
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
