"""The command line of a run that torchrun or srun starts: composed once, and the same on every rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from longctx import signals
from longctx.distributed.launcher import launcher_environment
from longctx.errors import UserError
from longctx.run.rank import main as rank_main
from longctx.run.rank import print_from_rank, run_as_rank

PREFLIGHT = "preflight"  # as the first word: the nodes are checked and nothing is trained


def main(words: Sequence[str]) -> int:
    """Take part in a run as one rank, from the command line to the exit status."""
    if (requeues := _said(words, "launch.requeues")) is not None:
        signals.limit_requeues(int(requeues))  # before the config is composed: a signal may come first
    if words[:1] == ["--resolved"]:
        return rank_main(words[1])

    def body(rank: int, world: int) -> int:
        if list(words[:1]) == [PREFLIGHT]:
            from longctx.run import preflight

            return preflight.run(compose(list(words)))
        if world > 1:
            print_from_rank(f"starting {world} ranks", speak=rank == 0)
        from longctx.run.train import run

        return run(agree_on_config(list(words), rank) if world > 1 else compose(words))

    return run_as_rank(body)


def compose(words: Sequence[str]) -> Any:
    """The config of a run's command line, or of a preflight's. Raises UserError."""
    verb, words = (PREFLIGHT, words[1:]) if words[:1] == [PREFLIGHT] else ("train", words)
    from longctx.config.compose import load
    from longctx.config.words import parse
    from longctx.verbs import VERBS

    line = parse(list(words))
    if line.help or line.cfg or line.multirun:
        raise UserError("-m, --cfg and --help belong to `longctx train`; under torchrun and srun give overrides only")
    return load(VERBS[verb], line.overrides, line.folders)


def agree_on_config(words: list[str], rank: int) -> Any:
    """The config that rank 0 composed, equal on all ranks.

    Raises UserError on every rank where rank 0 cannot compose it or a rank has another command line or version.
    """
    from longctx.config.base import build
    from longctx.config.train import EngineConfig, TrainConfig

    message: dict[str, Any] = {}
    minutes = meeting_minutes(words)
    if rank == 0:  # before the meeting: how long it may last is in the config
        from longctx.train import runfolder

        try:
            config = compose(words)
            message = {"config": runfolder.to_dict(config), "hash": runfolder.fingerprint(config)}
            minutes = config.launch.meeting_minutes
            signals.limit_requeues(config.launch.requeues)
        except UserError as error:
            message = {"error": str(error)}
    import torch.distributed as dist

    from longctx.distributed import ranks
    from longctx.train import runfolder

    world = int(launcher_environment()["WORLD_SIZE"])
    ranks.join(rank, world, EngineConfig().timeout_seconds, meeting_seconds=60 * minutes, command=words)
    box = [message]
    dist.broadcast_object_list(box, src=0)
    message = box[0]
    if "error" in message:
        raise UserError(message["error"])
    config = build(TrainConfig, message["config"], origin="rank 0's config")
    answers: list[Any] = [None] * world
    dist.all_gather_object(answers, runfolder.fingerprint(config) == message["hash"])
    if not all(answers):
        raise UserError(
            f"rank {answers.index(False)} reads rank 0's config otherwise than rank 0 does, so it runs other code; "
            "install the same version of longctx on every node"
        )
    return config


def meeting_minutes(words: Sequence[str]) -> float:
    """launch.meeting_minutes for a rank that does not compose the config: the command line's, or the default.

    The default holds for a value that the schema refuses as well, because rank 0 says so when the ranks have met.
    """
    from longctx.config.base import build
    from longctx.config.train import LaunchConfig

    said = _said(words, "launch.meeting_minutes")
    try:
        return build(LaunchConfig, {} if said is None else {"meeting_minutes": said}, origin="").meeting_minutes
    except UserError:
        return LaunchConfig().meeting_minutes


def _said(words: Sequence[str], key: str) -> float | None:
    """The number that the command line gives to a key, if it gives one."""
    for word in reversed(words):
        name, _, value = word.lstrip("+").partition("=")
        if name == key and value.replace(".", "", 1).isdigit():
            return float(value)
    return None
