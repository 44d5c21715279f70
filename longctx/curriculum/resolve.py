"""Resolves a curriculum to numbers: each stage's rope, steps, learning rate, mix and layout.

This is pure arithmetic on the validated config and three facts about the model (head size, rope_parameters, window), so
the planner, the table of `longctx theta` and every rank of a training run get the same stages. All mistakes that a user
can make between stages are refused here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from longctx.config.curriculum import AdvanceConfig, CurriculumConfig, StageConfig
from longctx.curriculum.select import FoundTheta, read_theta_file, selected
from longctx.curriculum.stage import Advance, Stage
from longctx.curriculum.steps import batch_size, steps_and_rates
from longctx.errors import UserError
from longctx.rope import THETA_ONLY, ExplicitTheta, Rope, apply, check_fixed, check_theta


def resolve(config: CurriculumConfig, *, head_dim: int, rope: Mapping[str, Any], window: int, file: str) -> list[Stage]:
    """Resolve the stages of a curriculum for one model.

    head_dim, rope (rope_parameters) and window (max_position_embeddings) are the model's before the first stage. file:
    the curriculum's file, for messages. Raises UserError for a stage that cannot be trained as it is written.
    """
    chosen = selected(config, file)
    overrides = read_theta_file(config, file)
    original = Rope(dict(rope), head_dim, window)
    previous = original
    stages: list[Stage] = []
    rates = steps_and_rates(config, chosen, file)
    for index, (name, stage) in enumerate(chosen.items()):
        where = f"curriculum.stages.{name}"
        _check_length(config, where, stage.seq_len, previous.window, first=index == 0, file=file)
        window = max(stage.seq_len, previous.window) if config.keep_window else stage.seq_len
        parameters, rule = _rope(config, stage, window, original, previous, where, file, found=name in overrides)
        if name in overrides:
            parameters = _with_found(parameters, rule, stage.seq_len, overrides[name], where, config.theta_file)
        check_theta(parameters["rope_theta"], where, file)
        check_fixed(parameters, where, file)
        if parameters["rope_theta"] < previous.theta and (index or not config.scratch):
            raise UserError(
                f"{where}: theta={parameters['rope_theta']:.0f} is below the {previous.theta:.0f} it starts from; a "
                "theta must not fall from stage to stage, or positions learned so far are lost. Give a higher theta, "
                f"or rule.start=previous so that the rule goes on from the stage before ({file})"
            )
        batch, steps = batch_size(stage, where, file), rates[name].steps
        stages.append(
            Stage(
                name=name,
                index=index,
                seq_len=stage.seq_len,
                window=window,
                rope=parameters,
                theta=parameters["rope_theta"],
                tokens=steps * batch * stage.seq_len,
                batch=batch,
                steps=steps,
                lr=rates[name].rate,
                mix=stage.mix or config.mix,
                layout=stage.layout or config.layout,
                advance=_advance(stage.advance or config.advance),
                start_window=previous.window,
                rule=rule,
            )
        )
        previous = Rope(parameters, head_dim, window, file)
    return stages


def _check_length(config: CurriculumConfig, where: str, length: int, before: int, *, first: bool, file: str) -> None:
    if config.keep_window or (config.scratch and first):
        return
    if first and length < before:
        raise UserError(
            f"{where}.seq_len={length} is shorter than the model's window of {before}; start at {before} or longer, "
            f"drop the stage ('~{where}'), take another curriculum=..., or set "
            "curriculum.keep_window=true for a fine-tune that extends nothing, or "
            f"curriculum.scratch=true for a model that is trained from scratch ({file})"
        )
    if not first and (length < before or (length == before and not config.scratch)):
        raise UserError(
            f"{where}.seq_len={length} does not come after {before}: the lengths of the stages must increase; give it "
            f"a longer seq_len or drop the stage ('~{where}') ({file})"
        )


def _rope(
    config: CurriculumConfig,
    stage: StageConfig,
    window: int,
    original: Rope,
    previous: Rope,
    where: str,
    file: str,
    *,
    found: bool,
) -> tuple[dict[str, Any], str]:
    """The stage's rope_parameters and the name of the rule that made them.

    window: the model's after the stage, in tokens. found: a theta file has this stage's theta, so the stage need not
    name one.
    """
    if stage.theta is not None and stage.rule is not None:
        raise UserError(
            f"{where} names both theta={stage.theta} and rule={stage.rule.name!r}; give exactly one of the two and "
            f"set the other to null ({file})"
        )
    if stage.theta is not None:
        return apply(ExplicitTheta(theta=stage.theta), original, window, where), ExplicitTheta.name
    if stage.rule is None and config.keep_window and window == previous.window:
        return dict(previous.parameters), ExplicitTheta.name
    rule = stage.rule or config.rule
    if rule is None:
        if config.scratch:
            return dict(previous.parameters), ExplicitTheta.name
        if found:
            return apply(ExplicitTheta(theta=original.theta), original, window, where), ExplicitTheta.name
        raise UserError(
            f"{where} names neither theta nor rule, and the curriculum has no rule; give one of them, for example "
            f"{where}.rule=dynamic-ntk ({file})"
        )
    start = previous if rule.start == "previous" else original
    return apply(rule, start, window, f"{where}.rule"), rule.name


def _with_found(
    parameters: dict[str, Any], rule: str, seq_len: int, found: FoundTheta, where: str, path: str | None
) -> dict[str, Any]:
    """Replace the theta of the stage's rope by the one that a search found for its length under the same scaling."""
    if found.seq_len not in (None, seq_len):
        raise UserError(
            f"{where}: its theta was searched at {found.seq_len} tokens and the stage has seq_len={seq_len}; search "
            f"again at that length, or give the stage a theta or rule of its own and delete its entry ({path})"
        )
    same = found.rule is None or found.rule == rule or {found.rule, rule} <= THETA_ONLY
    if not same:
        raise UserError(
            f"{where}: its theta was searched under rule {found.rule!r} and the stage has rule {rule!r}, whose other "
            f"scaling it was not judged with; set {where}.rule={found.rule}, or search again under {rule!r} ({path})"
        )
    return {**parameters, "rope_theta": found.theta}


def _advance(config: AdvanceConfig) -> Advance | None:
    return Advance(config.steps, config.min_drop, config.min_share) if config.enabled else None
