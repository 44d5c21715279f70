"""`python -m tests.dist.killed`: one of two ranks; rank 0, which serves the store, is killed while rank 1 waits."""

from __future__ import annotations

import os
import signal

from longctx.run.rank import leave, run_as_rank


def body(rank: int, world: int) -> int:
    import torch
    import torch.distributed as dist

    from longctx.distributed import ranks

    ranks.start("cpu").barrier()
    if rank == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.all_reduce(torch.zeros(1))
    return 0


if __name__ == "__main__":
    leave(run_as_rank(body))
