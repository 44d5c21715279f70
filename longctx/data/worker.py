"""`python -m longctx.data.worker FD PARENT`: a process that tokenizes the shards that it receives through a pipe.

It ends when it receives None. The parent may kill it at any time and removes its unfinished files.
"""

from __future__ import annotations

import os
import signal
import sys
from multiprocessing.connection import Connection

from longctx.data.tokens import tokenize_shard
from longctx.processes import die_with_parent


def main(fd: int, parent: int) -> None:
    """Receive the TokenizerSpec, then jobs; send back None or the error that a job raised."""
    die_with_parent(parent)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the library has no other switch; there is one process per core
    pipe = Connection(fd)
    spec = pipe.recv()
    while (job := pipe.recv()) is not None:
        try:
            tokenize_shard(job, spec)
        except Exception as error:  # the parent raises it
            pipe.send(error)
        else:
            pipe.send(None)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles ctrl-C
    main(*map(int, sys.argv[1:]))
