"""Read the inputs of `longctx theta`: a model or three numbers to start from, a curriculum or a length to reach."""

from __future__ import annotations

import dataclasses

from longctx.assets import config_folder
from longctx.config.curriculum import CurriculumConfig, LearningRateConfig, StageConfig
from longctx.config.theta import ThetaConfig
from longctx.curriculum import Stage, resolve
from longctx.errors import UserError
from longctx.rope import DynamicNtk, ExplicitTheta, Rope, rope_of_model

COMMAND = "the command line"
_SEARCH_STRETCH = 16  # the length to search at by default, as a multiple of the window


def starting_rope(config: ThetaConfig) -> Rope:
    """Return the rope to start from: the model's, that of head_dim, theta and from, or the curriculum's own.

    Raises UserError when no start is given, or when a model and numbers are both given.
    """
    numbers = {"head_dim": config.head_dim, "theta": config.theta}
    if config.model is not None and any(value is not None for value in numbers.values()):
        given = ", ".join(name for name, value in numbers.items() if value is not None)
        raise UserError(
            f"{given} and a model are both given, and a model's config.json has these values; leave one out ({COMMAND})"
        )
    if config.model is not None:
        model = config.model
        if model.path is not None and not config.search:  # a search loads the model itself
            model = dataclasses.replace(model, path=config_folder(model.path))
        rope = rope_of_model(model)
        return rope if config.from_ is None else dataclasses.replace(rope, window=config.from_)
    made_for = config.curriculum.made_for if config.curriculum is not None else None
    head_dim = config.head_dim or (made_for.head_dim if made_for else None)
    theta = config.theta or (made_for.theta if made_for else None)
    window = config.from_ or (made_for.window if made_for else None)
    missing = [n for n, v in (("head_dim", head_dim), ("theta", theta), ("from", window)) if not v]
    if missing or head_dim is None or theta is None or window is None:
        raise UserError(
            f"there is no model to start from: give model.path=FOLDER, or {' and '.join(missing)} "
            f"(head_dim=128 theta=500000 from=8192 is Llama 3; {COMMAND})"
        )
    return Rope({"rope_type": "default", "rope_theta": theta}, head_dim, window, COMMAND)


def target_stages(config: ThetaConfig, rope: Rope) -> tuple[list[Stage], list[str]]:
    """Return the resolved stages, and the name of the rule that gives each one's theta."""
    curriculum, file = _curriculum(config, rope)
    try:
        stages = resolve(curriculum, head_dim=rope.head_dim, rope=rope.parameters, window=rope.window, file=file)
    except UserError as error:
        if config.curriculum is not None:
            raise
        ((name, stage),) = curriculum.stages.items()  # made here of to and rule, and these are what the user can set
        said = str(error).replace(f"curriculum.stages.{name}.rule", "rule")
        raise UserError(said.replace(f"curriculum.stages.{name}", f"to={stage.seq_len}")) from None
    return stages, ["explicit" if stage.rule == ExplicitTheta.name else stage.rule for stage in stages]


def _curriculum(config: ThetaConfig, rope: Rope) -> tuple[CurriculumConfig, str]:
    if config.curriculum is not None:
        if config.to is not None or config.rule is not None:
            raise UserError(
                "to and rule describe one step, but a curriculum is given as well; leave them out, or set a stage's "
                f"own rule: curriculum.stages.NAME.rule=ntk, or for all of them rope=ntk ({COMMAND})"
            )
        return config.curriculum, "configs/curriculum and the command line"
    to = config.to or (rope.window * _SEARCH_STRETCH if config.search else None)
    if to is None:
        raise UserError(f"the length to reach is missing: give to=131072, or curriculum=8k_to_1048k ({COMMAND})")
    if to < rope.window:
        raise UserError(
            f"to={to} is shorter than the window of {rope.window}, and rules only stretch; give to={rope.window} or "
            f"more ({rope.source})"
        )
    stage = StageConfig(seq_len=to, steps=1, batch=1)
    rule = config.rule or DynamicNtk()
    return (
        CurriculumConfig(stages={f"s{to}": stage}, rule=rule, lr=LearningRateConfig(peak=1e-5)),
        COMMAND,
    )
