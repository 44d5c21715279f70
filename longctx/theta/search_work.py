"""One rank's part of a theta search: load the model and the texts, score every candidate, write the result.

Every candidate is judged on the same texts and needles. Rank 0 writes each trial when it ends, so an interrupted
search goes on. With several ranks, ring attention shares each sequence.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np

from longctx import console
from longctx.curriculum import Stage
from longctx.fingerprint import fingerprint_of, folder_fingerprint
from longctx.theta.bracket import BestTheta, narrow
from longctx.theta.curve import draw_curve
from longctx.theta.search_job import SearchJob
from longctx.theta.search_result import SearchResult, write_override
from longctx.theta.trials import Trial, TrialFile

if TYPE_CHECKING:
    from longctx.data import PackedSequence, StageData
    from longctx.theta.search_data import SearchData


def run_search(job: SearchJob) -> SearchResult:
    """Search as one rank of the world; rank 0 writes the curve and the stage override file."""
    from longctx.distributed import ranks as worlds

    ranks = worlds.start()
    try:
        if not ranks.first:
            console.silence()
        result = _run(job, ranks)
        if ranks.first:
            best, rule = result.best.theta, result.rule.theta
            draw_curve(result.trials, rule=rule, best=best, length=result.seq_len, path=job.png)
            write_override(job.override, result, job.stage.rule, job.model_fingerprint)
        return result
    finally:
        worlds.stop()


def _run(job: SearchJob, ranks: Any) -> SearchResult:
    from longctx.attention import ContextParallel
    from longctx.model import model_of
    from longctx.shape import shape_of_model
    from longctx.theta.objective import Adaptation, Objective
    from longctx.train.batch import micro_batch
    from longctx.train.identity import check_nodes
    from longctx.train.machine import kernel_of

    stage, settings = job.stage, job.config.trials
    with ranks.agree("loading the model and its documents"):
        model = model_of(job.model).to(ranks.device)
        data, trained = _search_data(job)
    wanted = job.model.attention_kernel
    kernel = kernel_of(job.model, shape_of_model(job.model), ranks.device.type, tried=True)
    console.say(f"{job.model.dtype} weights, attention kernel {kernel} on {ranks.device.type}")
    context = ContextParallel.from_world(kernel=None if wanted == "auto" else wanted)
    objective = Objective(model, job.model.memory, context, ranks, precision=job.model.rotary)
    steps = range(settings.adapt_steps)
    adapt = Adaptation([micro_batch(trained, [step], context, "zigzag") for step in steps], settings.adapt_lr)
    contents = _contents(data, [trained.sequence(step) for step in steps] if trained else [])
    files = None
    if ranks.local_rank == 0:
        files = {"model.path": {"": job.model_fingerprint}, "data": {"": contents}}
    check_nodes(ranks, files)
    file = TrialFile(job.folder / f"trials-{stage.name}.jsonl", _key(job, contents)) if ranks.first else None
    done: dict[int, Trial] = ranks.broadcast(file.done if file else {})
    trials: dict[int, Trial] = {}

    def score(theta: int, phase: str) -> float:
        if theta not in done:
            began = time.perf_counter()
            text, needle = objective.losses({**stage.rope, "rope_theta": theta}, data, adapt)
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


def _result(stage: Stage, found: BestTheta, trials: dict[int, Trial]) -> SearchResult:
    ordered = [trials[theta] for theta in sorted(trials)]
    return SearchResult(stage.name, stage.seq_len, trials[int(stage.theta)], trials[found.theta], found.edge, ordered)


def _search_data(job: SearchJob) -> tuple[SearchData, StageData | None]:
    """The sequences of every trial, and the stage's own data where candidates are trained on it first."""
    from longctx.data import open_stage_data
    from longctx.data.tokenizer import load_tokenizer
    from longctx.theta.search_data import load_search_data

    tokenizer = load_tokenizer(job.model)
    settings, stage, cache = job.config.trials, job.stage, job.folder / "data"
    sequences = load_search_data(
        job.data,
        stage.mix,
        tokenizer,
        length=stage.seq_len,
        trials=settings,
        cache=cache,
    )
    if not settings.adapt_steps:
        return sequences, None
    return sequences, open_stage_data(
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


def _contents(data: SearchData, packed: Sequence[PackedSequence]) -> str:
    """Return the SHA-256 of all tokens, loss weights and document boundaries that a trial reads."""
    digest = hashlib.sha256()
    for sequence in (*data.texts, *data.needles, *packed):
        digest.update(sequence.tokens.tobytes() + sequence.weights.tobytes())
    for sequence in packed:
        digest.update(np.asarray(sequence.boundaries, np.int64).tobytes())
    return digest.hexdigest()


def _key(job: SearchJob, contents: str) -> str:
    """Fingerprint everything that a trial's losses depend on; the bracket and needle_weight do not change them."""
    model, stage = job.model, job.stage
    free = ("stage", "bracket", "points", "rounds", "attempts", "needle_weight")
    settings = {key: value for key, value in asdict(job.config.trials).items() if key not in free}
    rope = {key: value for key, value in stage.rope.items() if key != "rope_theta"}
    return fingerprint_of(
        {
            "model": job.model_fingerprint,
            "tokenizer": folder_fingerprint(str(model.tokenizer or model.path)),
            "dtype": model.dtype,
            "rotary": model.rotary,
            "length": stage.seq_len,
            "rope": rope,
            "mix": stage.mix,
            "data": contents,
            "trials": settings,
        }
    )
