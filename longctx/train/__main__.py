"""`python -m longctx.train key=value ...` under torchrun or srun: the same command on every node.

Rank 0 composes the config and broadcasts it; the others compare a hash of their own command line with rank
0's, so that two nodes started with different settings are refused instead of training something in between.
`--resolved FILE` is how `longctx train` hands the composed config to the ranks it starts itself.
"""

from __future__ import annotations

import hashlib
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from longctx import __version__, signals
from longctx.distributed.launcher import launcher_environment
from longctx.errors import OutOfMemory, RunFailed, UserError
from longctx.processes import die_with_parent


def main(words: Sequence[str]) -> int:
    """One rank, from its command line to its exit status. Only rank 0 speaks, unless another has its own
    error.
    """
    environment = launcher_environment()
    rank = int(environment["RANK"])
    world = int(environment["WORLD_SIZE"])
    signals.catch(requeue=True, speaks=rank == 0)  # before what takes long to import
    die_with_parent()
    try:
        if words[:1] != ["--resolved"] and world > 1:
            _tell(f"starting {world} ranks", rank == 0)
        from longctx.train import runfolder
        from longctx.train.run import run, train

        if words[:1] == ["--resolved"]:  # started by `longctx train`, which runs the hooks itself
            status = train(runfolder.read(Path(words[1])), prepared=world > 1)
        else:
            status = run(_config(list(words), rank, world))
        if status == signals.SAVED_AND_REQUEUE:
            signals.note_requeue()
        return status
    except UserError as error:
        _tell(str(error), rank == 0)
        _leave_group()
        return 2
    except OutOfMemory as error:
        _tell(str(error), speak=bool(str(error)))  # whichever rank it was
        return 1
    except RunFailed as error:
        _tell(str(error), rank == 0)
        _leave_group()
        return 1
    except KeyboardInterrupt:
        _tell("interrupted", rank == 0)
        return signals.INTERRUPTED
    except Exception as error:  # the last place that can say which rank it was
        if world > 1 and _lost_peers(error):
            time.sleep(5.0)  # the rank that died speaks first, and its launcher ends this one
            first = str(error).strip().partition("\n")[0]
            print(f"longctx: rank {rank} lost its peers and stops ({first})", file=sys.stderr, flush=True)
            return 1
        print(f"longctx: rank {rank} of {world} failed:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
        return 1


def _lost_peers(error: Exception) -> bool:
    """Whether this is how another rank's death looks from here: torch's own types, or gloo's RuntimeError, which
    begins with the place in gloo's source.
    """
    import torch.distributed as dist

    from longctx.distributed.transport import PeerLost

    if isinstance(error, (PeerLost, dist.DistBackendError, dist.DistNetworkError, dist.DistStoreError)):
        return True
    place = str(error).partition("]")[0]
    return isinstance(error, RuntimeError) and place.startswith("[") and "gloo" in place


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
    """Rank 0 composes; everybody gets the result, or the mistake."""
    import torch.distributed as dist

    from longctx.config.base import build
    from longctx.config.train import EngineConfig, TrainConfig
    from longctx.distributed import ranks
    from longctx.train import runfolder

    ranks.join(rank, int(launcher_environment()["WORLD_SIZE"]), EngineConfig().timeout_seconds)
    spoken = hashlib.sha256(repr((__version__, words)).encode()).hexdigest()
    box: list[Any] = [None]
    if rank == 0:
        try:
            config = _compose(words)
            box = [
                {
                    "command": spoken,
                    "config": runfolder.to_dict(config),
                    "hash": runfolder.fingerprint(config),
                }
            ]
        except UserError as error:
            box = [{"error": str(error)}]
    dist.broadcast_object_list(box, src=0)
    if "error" in box[0]:
        raise UserError(box[0]["error"])
    config = build(TrainConfig, box[0]["config"], origin="rank 0's config")
    same = spoken == box[0]["command"] and runfolder.fingerprint(config) == box[0]["hash"]
    answers: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(answers, same)
    if not all(answers):
        raise UserError(
            f"rank {answers.index(False)} was started with another command line or version of longctx than "
            "rank 0; run the same command on every node"
        )
    return config


def _leave_group() -> None:
    """A rank that leaves with its group open may be aborted by gloo's threads, and its status with it."""
    from longctx.distributed import ranks

    ranks.stop()


def _tell(text: str, speak: bool) -> None:
    if speak:
        print(f"longctx: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    status = main(sys.argv[1:])
    signals.done()
    sys.exit(status)
