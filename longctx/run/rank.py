"""`python -m longctx.run.rank FILE`: one rank of a run whose config is FILE, the config.yaml in the run's folder.

`longctx train` starts its ranks this way. `run_as_rank` also serves the ranks that torchrun or srun start.
"""

from __future__ import annotations

import re
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from longctx import collector, signals
from longctx.distributed.launcher import launcher_environment, quiet_torch
from longctx.errors import OutOfMemory, RunFailed, UserError, refused_by_system
from longctx.processes import die_with_parent


def main(path: str) -> int:
    """Train as one rank and return its exit status.

    Without a launcher's environment this process starts launch.nproc ranks itself.
    """

    def body(rank: int, world: int) -> int:
        from longctx.run.training import train_run
        from longctx.train import runfolder

        signals.all_saved(runfolder.saved_in(Path(path).parent))
        return train_run(runfolder.read(Path(path)), checked=world > 1)

    return run_as_rank(body)


def run_as_rank(body: Callable[[int, int], int]) -> int:
    """Run body(rank, world) as one rank, and turn its errors into one message and an exit status.

    Only rank 0 writes messages, unless another rank has an error of its own. Where all ranks know that they end, they
    leave together.
    """
    quiet_torch()
    try:
        environment = launcher_environment()
    except UserError as error:  # no rank knows its number
        signals.catch(requeue=True)
        print_from_rank(str(error), speak=True)
        return 2
    rank, world = int(environment["RANK"]), int(environment["WORLD_SIZE"])
    signals.catch(requeue=True, speaks=rank == 0)  # before the slow imports
    collector.begin_imports()
    die_with_parent()
    try:
        return _leave_with(body(rank, world))
    except UserError as error:
        print_from_rank(str(error), speak=rank == 0)
        return _leave_with(2)
    except OutOfMemory as error:
        print_from_rank(str(error), speak=bool(str(error)))  # any rank may explain it; the others have an empty message
        return 1
    except RunFailed as error:
        # Rank 0 may be the one that is missing at the meeting.
        print_from_rank(str(error), speak=rank == 0 or (environment["LOCAL_RANK"] == "0" and _not_met(error)))
        return _leave_with(1)
    except KeyboardInterrupt:
        print_from_rank("interrupted", speak=rank == 0)
        return signals.INTERRUPTED
    except Exception as error:  # only here is it still known which rank failed
        if world > 1 and _lost_peers(error):
            time.sleep(5.0)  # the rank that died speaks first, and its launcher ends this one
            if rank == 0 or (rank == 1 and _rank_0_is_gone()):
                print_from_rank(
                    f"rank {rank} lost its peers and stops ({_words(error)}); {signals.saved_so_far()}", speak=True
                )
            return 1
        if text := refused_by_system(error):
            print_from_rank(f"rank {rank} of {world} ends: {text}; {signals.saved_so_far()}", speak=True)
            return 1
        print_from_rank(f"rank {rank} of {world} failed:\n{traceback.format_exc()}", speak=True)
        return 1


def _leave_with(status: int) -> int:
    """Leave together with the other ranks; returns this process's exit status.

    The process group is closed: gloo's threads may abort a rank that leaves it open, and change its status.
    """
    signals.done()  # a launcher ends all ranks as soon as one has left with a status
    if "torch" not in sys.modules:
        return 0 if signals.note_status(status) else status
    from longctx.distributed import meeting, ranks

    ranks.stop()
    return meeting.leave_together(status, signals.note_status)


def _not_met(error: RunFailed) -> bool:
    from longctx.distributed.meeting import NotMet

    return isinstance(error, NotMet)


def _rank_0_is_gone() -> bool:
    """Whether the store that rank 0 serves answers no more."""
    from longctx.distributed import meeting

    met = meeting.met()
    try:
        return met is None or not isinstance(met.store.check(["run"]), bool)
    except (RuntimeError, OSError):
        return True


def _lost_peers(error: Exception) -> bool:
    """Whether the error means that another rank died.

    torch has types of its own for it; gloo raises a RuntimeError whose text begins with a place in gloo's source.
    """
    import torch.distributed as dist

    from longctx.distributed.transport import PeerLost

    if isinstance(error, (PeerLost, dist.DistBackendError, dist.DistNetworkError, dist.DistStoreError)):
        return True
    place = str(error).partition("]")[0]
    return isinstance(error, RuntimeError) and place.startswith("[") and "gloo" in place


def _words(error: Exception) -> str:
    """The first sentence of an error of torch or gloo, without the place in its source."""
    return re.sub(r"^\[\S+:\d+\] ", "", str(error).strip()).partition("\n")[0].partition(". ")[0]


def print_from_rank(text: str, *, speak: bool) -> None:
    """Write a line to standard error if this rank may speak."""
    if speak:
        print(f"longctx: {text}", file=sys.stderr, flush=True)


def leave(status: int) -> None:
    """End this process with its rank's status; signals that come from here on are ignored."""
    signals.done()
    sys.exit(status)


if __name__ == "__main__":
    leave(main(sys.argv[1]))
