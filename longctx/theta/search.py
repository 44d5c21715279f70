"""`longctx theta search=true`: which theta a model itself reads long held-out documents best with.

Every candidate is judged on the same texts and needles; trials are written as they end, the best theta goes
into a stage override file that a curriculum reads. With several ranks (nproc, or under torchrun) the sequence
is shared by ring attention.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from longctx import console
from longctx import dtype as dtypes
from longctx.config.data import DataConfig
from longctx.config.model import ModelConfig
from longctx.config.theta import ThetaConfig
from longctx.curriculum import Stage
from longctx.data.check import check_sources, sources_of
from longctx.data.opening import choose_mix
from longctx.data.tokenizer import check_tokenizer_of
from longctx.errors import UserError, nearest
from longctx.identity import identity, key_of
from longctx.processes import warn_if_crowded
from longctx.rope import Rope
from longctx.storage.model import check_model
from longctx.theta.bracket import Found, narrow
from longctx.theta.curve import draw_curve
from longctx.theta.outcome import Result, tell, write_override
from longctx.theta.trials import Trial, TrialFile


@dataclass(frozen=True)
class Job:
    """What every rank gets. floor: the theta the stage must not fall below."""

    config: ThetaConfig
    model: ModelConfig
    data: DataConfig
    stage: Stage
    floor: int

    @property
    def folder(self) -> Path:
        return Path(self.config.folder)

    @property
    def png(self) -> Path:
        return Path(self.config.png) if self.config.png else self.folder / f"search-{self.stage.name}.png"

    @property
    def override(self) -> Path:
        """The stage override file."""
        return self.folder / "theta.yaml"


def search(config: ThetaConfig, rope: Rope, stages: Sequence[Stage]) -> int:
    """The search, on this process or on nproc ranks it starts, and what it found in words."""
    from longctx.distributed.launcher import launcher_environment

    job = job_of(config, rope, stages)
    environment = launcher_environment()
    if config.nproc > 1 and environment["WORLD_SIZE"] == "1":
        from longctx.theta.ranks import start

        warn_if_crowded("nproc", config.nproc)
        result = start(job, config.nproc)
    else:
        result = find(job)
    if environment["RANK"] == "0":
        tell(
            result,
            override=job.override,
            png=job.png,
            bracket=config.trials.bracket,
            as_json=config.format == "json",
        )
    return 0


def job_of(config: ThetaConfig, rope: Rope, stages: Sequence[Stage]) -> Job:
    """What every rank gets. Raises UserError when there is no model, no data or no such stage."""
    stage = chosen_stage(config, stages)
    if config.model is None or config.model.path is None:
        raise UserError(
            "search=true reads documents with the model itself: give model.path=FOLDER or model=tiny (the command line)"
        )
    if config.data is None:
        raise UserError("search=true needs held-out documents: give data=stdlib (the command line)")
    if config.nproc < 1:
        raise UserError(f"nproc={config.nproc} must be 1 or more ranks (configs/theta.yaml)")
    check_tokenizer_of(config.model, vocab_size=check_model(config.model.path).get("vocab_size"))
    mix = choose_mix(config.data, stage.mix, stage.name)
    check_sources(config.data, sources_of(config.data, [mix]), Path(config.folder) / "data")
    floor = stages[stage.index - 1].theta if stage.index else rope.theta
    return Job(config, dtypes.resolve(config.model)[0], config.data, stage, int(floor))


def chosen_stage(config: ThetaConfig, stages: Sequence[Stage]) -> Stage:
    """trials.stage, or the last."""
    name = config.trials.stage
    if name is None:
        return stages[-1]
    known = [stage.name for stage in stages]
    if name not in known:
        near = nearest(name, known)
        hint = f"did you mean {near!r}? " if near else ""
        raise UserError(f"trials.stage={name!r} is no stage; {hint}known: {', '.join(known)} (configs/theta.yaml)")
    return stages[known.index(name)]


def find(job: Job) -> Result:
    """One rank's part; rank 0 writes the curve and the stage override file."""
    from longctx.distributed import ranks as worlds

    ranks = worlds.start()
    try:
        if not ranks.first:
            console.silence()
        result = _run(job, ranks)
        if ranks.first:
            best, rule = result.best.theta, result.rule.theta
            draw_curve(result.trials, rule=rule, best=best, length=result.seq_len, path=job.png)
            write_override(job.override, result, job.stage.rule)
        return result
    finally:
        worlds.stop()


def _run(job: Job, ranks: Any) -> Result:
    from longctx.attention import ContextParallel
    from longctx.model import model_of
    from longctx.shape import shape_of_model
    from longctx.theta.objective import Objective
    from longctx.train.machine import kernel_of

    stage, settings = job.stage, job.config.trials
    with ranks.agree("loading the model and its documents"):
        model = model_of(job.model).to(ranks.device)
        material, adapt = _material(job)
    wanted = job.model.attention_kernel
    kernel = kernel_of(job.model, shape_of_model(job.model), ranks.device.type)
    console.say(f"{job.model.dtype} weights, attention kernel {kernel} on {ranks.device.type}")
    context = ContextParallel.from_world(kernel=None if wanted == "auto" else wanted)
    objective = Objective(model, job.model.memory, context, ranks, precision=job.model.rotary)
    file = TrialFile(job.folder / f"trials-{stage.name}.jsonl", _key(job)) if ranks.first else None
    done: dict[int, Trial] = ranks.broadcast(file.done if file else {})
    trials: dict[int, Trial] = {}

    def score(theta: int, phase: str) -> float:
        if theta not in done:
            began = time.perf_counter()
            text, needle = objective.losses({**stage.rope, "rope_theta": theta}, material, adapt)
            seconds = round(time.perf_counter() - began, 3)
            trial = ranks.broadcast(Trial(theta, text, needle, phase, seconds))
            if file:
                file.add(trial)
            done[theta] = trial
        trials[theta] = done[theta]
        shown = f", needles {done[theta].needle_loss:.4f}" if done[theta].needle_loss is not None else ""
        console.say(f"theta {theta:>14,}: last quarter {done[theta].last_quarter_loss:.4f}{shown} ({phase})")
        return done[theta].score(settings.needle_weight)

    try:
        found = narrow(
            score,
            int(stage.theta),
            bracket=settings.bracket,
            points=settings.points,
            rounds=settings.rounds,
            attempts=settings.attempts,
            lowest=job.floor,
            say=console.say,
        )
    finally:
        context.close()
    return _result(stage, found, trials)


def _result(stage: Stage, found: Found, trials: dict[int, Trial]) -> Result:
    ordered = [trials[theta] for theta in sorted(trials)]
    return Result(stage.name, stage.seq_len, trials[int(stage.theta)], trials[found.theta], found.edge, ordered)


def _material(job: Job) -> tuple[Any, Any]:
    from longctx.data import open_stage
    from longctx.data.tokenizer import load_tokenizer
    from longctx.theta.material import Weighted, gather
    from longctx.theta.objective import Adapt

    tokenizer = load_tokenizer(job.model)
    settings, stage, cache = job.config.trials, job.stage, job.folder / "data"
    material = gather(
        job.data,
        stage.mix,
        tokenizer,
        length=stage.seq_len,
        trials=settings,
        cache=cache,
    )
    if not settings.adapt_steps:
        return material, None
    data = open_stage(
        job.data,
        mix=stage.mix,
        seq_len=stage.seq_len,
        sequences=settings.adapt_steps,
        tokenizer=tokenizer,
        seed=settings.seed,
        split="train",
        cache=cache,
        stage=stage.name,
    )
    packed = [data.sequence(i) for i in range(settings.adapt_steps)]
    return material, Adapt([Weighted(p.tokens.astype("int64"), p.weights) for p in packed], settings.adapt_lr)


def _key(job: Job) -> str:
    """Everything that makes two trials' losses comparable; the bracket and the needles' weight do not."""
    model, stage = job.model, job.stage
    free = ("stage", "bracket", "points", "rounds", "attempts", "needle_weight")
    settings = {key: value for key, value in asdict(job.config.trials).items() if key not in free}
    rope = {key: value for key, value in stage.rope.items() if key != "rope_theta"}
    return key_of(
        {
            "model": identity(str(model.path)),
            "tokenizer": identity(str(model.tokenizer or model.path)),
            "dtype": model.dtype,
            "rotary": model.rotary,
            "length": stage.seq_len,
            "rope": rope,
            "mix": stage.mix,
            "data": asdict(job.data),
            "trials": settings,
        }
    )
