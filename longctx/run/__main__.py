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

from longctx.utf8 import use_utf8

use_utf8()

from longctx.run.command import main
from longctx.run.rank import leave

if __name__ == "__main__":
    leave(main(sys.argv[1:]))
