"""Start the ranks of a theta search on this machine, as processes `python -m longctx.theta.search_ranks FOLDER`.

The parent writes the pickled SearchJob into FOLDER; rank 0 writes the pickled result there, and a rank that fails
writes its error.
"""

from __future__ import annotations

import os
import pickle
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from longctx import signals
from longctx.distributed.launcher import quiet_torch
from longctx.errors import RunFailed, UserError
from longctx.processes import die_with_parent

if TYPE_CHECKING:
    from longctx.theta.search_job import SearchJob
    from longctx.theta.search_result import SearchResult


def start(job: SearchJob, nproc: int) -> SearchResult:
    """Search on `nproc` ranks and return rank 0's result. Raises the UserError or RunFailed of a failed rank."""
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
    """Run one rank; returns its exit status."""
    quiet_torch()
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
