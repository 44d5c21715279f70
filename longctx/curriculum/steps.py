"""Computes the batch, steps and learning rate of each stage; a decay may span several stages (kind `continue`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from longctx.config.curriculum import CurriculumConfig, LearningRateConfig, StageConfig
from longctx.curriculum.stage import LearningRate
from longctx.errors import UserError


@dataclass(frozen=True)
class StepsAndRate:
    """The steps and the learning rate of one stage."""

    steps: int
    rate: LearningRate


def steps_and_rates(config: CurriculumConfig, chosen: Mapping[str, StageConfig], file: str) -> dict[str, StepsAndRate]:
    """The steps and learning rate of each stage; stages of kind `continue` share the decay of the stage they follow."""
    steps = {name: _steps(stage, f"curriculum.stages.{name}", file) for name, stage in chosen.items()}
    kinds = {name: stage.lr.kind or config.lr.kind or "constant" for name, stage in chosen.items()}
    names = list(chosen)
    scheduled: dict[str, StepsAndRate] = {}
    for position, name in enumerate(names):
        where = f"curriculum.stages.{name}.lr"
        if kinds[name] == "continue":
            if position == 0:
                raise UserError(f"{where}.kind=continue has no stage before it to continue; name a kind ({file})")
            own = chosen[name].lr
            for key, value in (("peak", own.peak), ("final", own.final), ("warmup_steps", own.warmup_steps)):
                if value is not None:
                    raise UserError(
                        f"{where}.{key}={value} does not go with kind=continue, which goes on with the rate of "
                        f"{names[position - 1]}; leave it out, or name kind=constant, cosine or linear ({file})"
                    )
            before = scheduled[names[position - 1]]
            at = before.rate
            rate = LearningRate(at.peak, at.final, at.warmup_steps, at.kind, at.offset + before.steps, at.span)
        else:
            span = steps[name]
            for later in names[position + 1 :]:
                if kinds[later] != "continue":
                    break
                span += steps[later]
            rate = _rate(chosen[name].lr, config.lr, kinds[name], span, where, file)
        scheduled[name] = StepsAndRate(steps[name], rate)
    return scheduled


def _rate(
    own: LearningRateConfig, shared: LearningRateConfig, kind: str, span: int, where: str, file: str
) -> LearningRate:
    peak = own.peak if own.peak is not None else shared.peak
    final = own.final if own.final is not None else shared.final
    warmup = own.warmup_steps if own.warmup_steps is not None else shared.warmup_steps or 0
    if peak is None:
        raise UserError(f"{where}.peak is missing; give a learning rate, such as {where}.peak=2e-5 ({file})")
    if warmup > span:
        raise UserError(
            f"{where}.warmup_steps={warmup} must be at most the {span} steps it is part of, which follow from steps, "
            f"or from tokens, batch and seq_len; lower it or give the stage more tokens ({file})"
        )
    if kind == "constant":
        if own.final is not None and own.final != peak:
            raise UserError(
                f"{where}.final={own.final} does not go with kind=constant, which stays at the peak {peak}; name "
                f"kind=cosine or linear, or leave final out ({file})"
            )
        return LearningRate(peak, peak, warmup, kind, 0, span)
    final = 0.0 if final is None else final
    if final > peak:
        raise UserError(f"{where}.final={final} must be at most the peak {peak} ({file})")
    return LearningRate(peak, final, warmup, kind, 0, span)


def batch_size(stage: StageConfig, where: str, file: str) -> int:
    """Sequences per step; raises UserError when batch and batch_tokens do not give exactly one whole number."""
    if (stage.batch is None) == (stage.batch_tokens is None):
        raise UserError(
            f"{where} needs exactly one of batch (sequences per step) and batch_tokens (the same in tokens) ({file})"
        )
    if stage.batch is not None:
        return stage.batch
    assert stage.batch_tokens is not None
    if stage.batch_tokens % stage.seq_len:
        near = max(1, round(stage.batch_tokens / stage.seq_len)) * stage.seq_len
        raise UserError(
            f"{where}.batch_tokens={stage.batch_tokens} is not a whole number of sequences of {stage.seq_len} tokens; "
            f"{near} fits ({file})"
        )
    return stage.batch_tokens // stage.seq_len


def _steps(stage: StageConfig, where: str, file: str) -> int:
    if (stage.tokens is None) == (stage.steps is None):
        raise UserError(f"{where} needs exactly one of tokens and steps ({file})")
    if stage.steps is not None:
        return stage.steps
    assert stage.tokens is not None
    return -(-stage.tokens // (batch_size(stage, where, file) * stage.seq_len))  # whole batches, never fewer tokens
