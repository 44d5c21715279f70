"""The ranks of a search on this machine: `python -m longctx.theta.search_ranks FOLDER` finds its job there, pickled by the
process that started it, and rank 0 leaves its answer.
"""

from __future__ import annotations

import os
import pickle
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from longctx import signals
from longctx.errors import RunFailed, UserError
from longctx.processes import die_with_parent

if TYPE_CHECKING:
    from longctx.theta.search_job import SearchJob
    from longctx.theta.search_result import SearchResult


def start(job: SearchJob, nproc: int) -> SearchResult:
    """Search on `nproc` ranks over gloo; rank 0's result. Raises UserError or RunFailed with the rank's own message."""
    from longctx.distributed.local import run_ranks

    with tempfile.TemporaryDirectory(prefix="longctx-theta-") as name, signals.temporary(Path(name)) as folder:
        (folder / "job").write_bytes(pickle.dumps(job))
        threads = max(1, len(os.sched_getaffinity(0)) // nproc)
        with signals.swept(job.folder):
            ended = run_ranks(nproc, threads, "longctx.theta.search_ranks", str(folder))
        answers = sorted(folder.glob("answer*"))
        problems = [answer for path in answers if isinstance(answer := pickle.loads(path.read_bytes()), Exception)]
        if problems:
            raise problems[0]
        if ended.first is not None:
            rank, status = ended.first
            raise RunFailed(f"rank {rank} of the search failed (status {status})")
        return pickle.loads(answers[0].read_bytes())


def main(folder: Path) -> int:
    """One rank."""
    rank = os.environ["RANK"]
    signals.catch(speaks=False)
    die_with_parent()
    from longctx.theta.search_work import run_search

    job: SearchJob = pickle.loads((folder / "job").read_bytes())
    try:
        answer = run_search(job)
    except (UserError, RunFailed) as error:
        (folder / f"answer{rank}").write_bytes(pickle.dumps(error))
        return 1
    if rank == "0":
        (folder / "answer0").write_bytes(pickle.dumps(answer))
    return 0


if __name__ == "__main__":
    status = main(Path(sys.argv[1]))
    signals.done()
    sys.exit(status)
