"""`python -m longctx.data.worker FD PARENT`: a process that tokenizes the shards it is sent, until it is sent None.

The parent kills it when it is no longer needed and removes what it left half-written.
"""

from __future__ import annotations

import os
import signal
import sys
from multiprocessing.connection import Connection

from longctx.data.tokens import tokenize_shard
from longctx.processes import die_with_parent


def main(fd: int, parent: int) -> None:
    """Takes the TokenizerSpec, then jobs; answers each with None or the error it raised."""
    die_with_parent(parent)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the library's only switch; this process is one of many
    pipe = Connection(fd)
    spec = pipe.recv()
    while (job := pipe.recv()) is not None:
        try:
            tokenize_shard(job, spec)
        except Exception as error:  # carried to the parent, which raises it
            pipe.send(error)
        else:
            pipe.send(None)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent answers a ctrl-C
    main(*map(int, sys.argv[1:]))
