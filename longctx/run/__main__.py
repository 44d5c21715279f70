"""`python -m longctx.run key=value ...` under torchrun or srun: the same command on every node.

Rank 0 composes the config and broadcasts it. The others compare a hash of their own command line with rank 0's, so
that two nodes started with different settings are refused. `--resolved FILE` takes a run's config.yaml instead.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from typing import Any

from longctx import __version__
from longctx.distributed.launcher import launcher_environment
from longctx.errors import UserError
from longctx.run import rank as ranks_of_a_run
from longctx.run.rank import leave, rank_status, tell


def main(words: Sequence[str]) -> int:
    """Take part in a run as one rank, from the command line to the exit status."""
    if words[:1] == ["--resolved"]:
        return ranks_of_a_run.main(words[1])

    def body(rank: int, world: int) -> int:
        if world > 1:
            tell(f"starting {world} ranks", speak=rank == 0)
        from longctx.run.lifecycle import run

        return run(_config(list(words), rank, world))

    return rank_status(body)


def _config(words: list[str], rank: int, world: int) -> Any:
    if world == 1:
        return _compose(words)
    return _agree_on_config(words, rank)


def _compose(words: list[str]) -> Any:
    from longctx.config.compose import load
    from longctx.config.words import parse
    from longctx.verbs import VERBS

    line = parse(words)
    if line.help or line.cfg or line.multirun:
        raise UserError("-m, --cfg and --help belong to `longctx train`; under torchrun and srun give overrides only")
    return load(VERBS["train"], line.overrides, line.folders)


def _agree_on_config(words: list[str], rank: int) -> Any:
    """The config that rank 0 composed, equal on all ranks.

    Raises UserError on every rank where rank 0 cannot compose it or a rank has another command line or version.
    """
    import torch.distributed as dist

    from longctx.config.base import build
    from longctx.config.train import EngineConfig, TrainConfig
    from longctx.distributed import ranks
    from longctx.train import runfolder

    ranks.join(rank, int(launcher_environment()["WORLD_SIZE"]), EngineConfig().timeout_seconds)
    spoken = hashlib.sha256(repr((__version__, words)).encode()).hexdigest()
    message: list[Any] = [None]
    if rank == 0:
        try:
            config = _compose(words)
            message = [
                {
                    "command": spoken,
                    "config": runfolder.to_dict(config),
                    "hash": runfolder.fingerprint(config),
                }
            ]
        except UserError as error:
            message = [{"error": str(error)}]
    dist.broadcast_object_list(message, src=0)
    if "error" in message[0]:
        raise UserError(message[0]["error"])
    config = build(TrainConfig, message[0]["config"], origin="rank 0's config")
    same = spoken == message[0]["command"] and runfolder.fingerprint(config) == message[0]["hash"]
    answers: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(answers, same)
    if not all(answers):
        raise UserError(
            f"rank {answers.index(False)} was started with another command line or version of longctx than "
            "rank 0; run the same command on every node"
        )
    return config


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
