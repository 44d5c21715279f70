"""`python -m longctx.run key=value ...` under torchrun or srun: the same command on every node.

Rank 0 composes the config and broadcasts it once all ranks have met. A rank that was started with another command line
is refused at the meeting. `--resolved FILE` takes a run's config.yaml instead; `preflight` as the first word checks the
nodes and trains nothing.
"""

# ruff: noqa: E402
import signal

# Signals wait from the first instruction on, until longctx.signals can answer them.
signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP))

import sys
from collections.abc import Sequence

from longctx.run import rank as ranks_of_a_run
from longctx.run.command import PREFLIGHT, agree_on_config, compose
from longctx.run.rank import leave, rank_status, tell


def main(words: Sequence[str]) -> int:
    """Take part in a run as one rank, from the command line to the exit status."""
    if words[:1] == ["--resolved"]:
        return ranks_of_a_run.main(words[1])

    def body(rank: int, world: int) -> int:
        if list(words[:1]) == [PREFLIGHT]:
            from longctx.run import preflight

            return preflight.run(compose(list(words)))
        if world > 1:
            tell(f"starting {world} ranks", speak=rank == 0)
        from longctx.run.lifecycle import run

        return run(agree_on_config(list(words), rank) if world > 1 else compose(words))

    return rank_status(body)


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
