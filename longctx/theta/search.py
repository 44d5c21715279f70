"""`longctx theta search=true`: find the theta at which a model reads long held-out documents best.

This module checks the settings and starts the ranks; longctx.theta.search_work is what each rank does.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from longctx import dtype as dtypes
from longctx.config.theta import ThetaConfig
from longctx.curriculum import Stage
from longctx.data.check import check_sources, sources_of
from longctx.data.stage_opening import choose_mix
from longctx.data.tokenizer import check_tokenizer_of
from longctx.errors import UserError, nearest
from longctx.processes import check_crowd, warn_if_crowded
from longctx.rope import Rope
from longctx.storage.model import check_model
from longctx.theta.search_job import SearchJob
from longctx.theta.search_result import print_result


def search(config: ThetaConfig, rope: Rope, stages: Sequence[Stage]) -> int:
    """Search for a stage's theta, in this process or on nproc ranks, and print the result; returns 0."""
    from longctx.distributed.launcher import launcher_environment

    environment = launcher_environment()
    starts_ranks = config.nproc > 1 and environment["WORLD_SIZE"] == "1"
    if starts_ranks:
        check_crowd("nproc", config.nproc)
    job = job_of(config, rope, stages)
    if starts_ranks:
        from longctx.theta.search_ranks import start

        warn_if_crowded("nproc", config.nproc)
        result = start(job, config.nproc)
    else:
        from longctx.theta.search_work import run_search

        result = run_search(job)
    if environment["RANK"] == "0":
        print_result(
            result,
            override=job.override,
            png=job.png,
            bracket=config.trials.bracket,
            as_json=config.format == "json",
        )
    return 0


def job_of(config: ThetaConfig, rope: Rope, stages: Sequence[Stage]) -> SearchJob:
    """Check the settings and resolve the job. Raises UserError when the model, the data or the stage is missing."""
    stage = chosen_stage(config, stages)
    if config.model is None or config.model.path is None:
        raise UserError(
            "search=true reads documents with the model itself: give model.path=FOLDER or model=tiny (the command line)"
        )
    if config.data is None:
        raise UserError("search=true needs held-out documents: give data=stdlib (the command line)")
    check_tokenizer_of(config.model, vocab_size=check_model(config.model.path).get("vocab_size"))
    if stage.mix in config.data.mixes or config.trials.adapt_steps:
        mixes = [choose_mix(config.data, stage.mix, stage.name)]
    else:  # no candidate is trained, and text is taken from all sources
        mixes = list(config.data.mixes.values())
    check_sources(config.data, sources_of(config.data, mixes), Path(config.folder) / "data")
    floor = stages[stage.index - 1].theta if stage.index else rope.theta
    return SearchJob(config, dtypes.resolve(config.model)[0], config.data, stage, int(floor))


def chosen_stage(config: ThetaConfig, stages: Sequence[Stage]) -> Stage:
    """Return the stage that trials.stage names; the last stage by default."""
    name = config.trials.stage
    if name is None:
        return stages[-1]
    known = [stage.name for stage in stages]
    if name not in known:
        near = nearest(name, known)
        hint = f"did you mean {near!r}? " if near else ""
        raise UserError(f"trials.stage={name!r} is no stage; {hint}known: {', '.join(known)} (configs/theta.yaml)")
    return stages[known.index(name)]
