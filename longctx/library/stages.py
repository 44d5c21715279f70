"""`load_curriculum` and `plan`: the stages of a training in numbers, and what they need."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longctx.errors import UserError, nearest
from longctx.library.arguments import rope_from

if TYPE_CHECKING:
    from longctx.curriculum import Stage


def load_curriculum(
    name_or_path: str | Path, *, model: Any, only: Sequence[str] | None = None, **changes: Any
) -> list[Stage]:
    """Resolve a curriculum to numbers for one model.

    name_or_path: a curriculum that ships with longctx (a file of configs/curriculum, without its .yaml), or your own
    YAML file. model: as `rope_for` takes it. only: names of the stages to keep. changes: other top-level keys of the
    file, such as rule="ntk" or theta_file="thetas.yaml".

    Returns the stages in order; of each: name, seq_len and start_window (tokens), rope (rope_parameters), theta,
    tokens (of the stage, altogether), batch (sequences per step), steps, lr.at(step), mix, layout. docs/curriculum.md
    has the file's keys. Raises UserError for a name that is not known and for every stage that cannot be: a length
    that does not grow, a theta that falls, two ways to say one thing.

    >>> import longctx
    >>> stages = longctx.load_curriculum("tiny_16x", model=MODEL)
    >>> [(stage.name, stage.seq_len, stage.theta, stage.steps) for stage in stages]
    [('s2048', 2048, 154243, 40), ('s8192', 8192, 2379094, 64)]
    """
    from longctx.config.base import build
    from longctx.config.curriculum import CurriculumConfig
    from longctx.curriculum import resolve

    file = _curriculum_file(name_or_path)
    values = {**_read_yaml(file), **({} if only is None else {"only": only}), **changes}
    config = build(CurriculumConfig, values, origin=str(file))
    rope = rope_from(model, "load_curriculum")
    return resolve(config, head_dim=rope.head_dim, rope=rope.parameters, window=rope.window, file=str(file))


def plan(
    model: str | Path,
    *,
    curriculum: str = "8k_to_1048k",
    nodes: int = 1,
    ranks: int = 8,
    hardware: str = "h100",
    overrides: Sequence[str] = (),
) -> dict[str, Any]:
    """Predict memory, time and schedule of every stage of a training, before anything is started.

    model: a folder or hub id in Hugging Face format, of which only config.json is read. curriculum, hardware: names of
    configs/curriculum and configs/hardware. nodes: machines; ranks: devices in each. overrides: a list of words as on
    the command line (`longctx plan --help`), such as ["engine=deepspeed", "engine.zero=3"]; with ["--config-dir", "my"]
    curriculum="mine" is my/curriculum/mine.yaml.

    Returns what `longctx plan format=json` prints: per stage its split (cp, dp, schedule), `memory` in bytes per
    device by part and in `total`, `fits`, `flop_per_step` of all devices, `seconds_per_step`, `hours`; and `hours` and
    `device_hours` of all. An estimate to choose by, within tens of percent (docs/plan.md has the formulas). Raises
    UserError for settings that training would refuse, memory excepted: there `fits` is False. A model that training
    would refuse, such as one of another family, gets its figures and a warning.

    >>> import longctx
    >>> stages = longctx.plan(MODEL, curriculum="tiny_16x", ranks=2, hardware="cpu")["stages"]
    >>> stages["s8192"]["schedule"], stages["s8192"]["cp"], stages["s8192"]["fits"]
    ('flat_ring', 2, True)
    """
    from dataclasses import replace

    from longctx.config.base import build
    from longctx.config.compose import compose
    from longctx.config.plan import PlanConfig
    from longctx.config.words import parse
    from longctx.planner.run import planned

    if not isinstance(model, str | Path):
        raise UserError(f"plan: model={type(model).__name__} is not a folder or hub id; give one, as text or a Path")
    if isinstance(overrides, str):
        raise UserError(f"plan: overrides={overrides!r} is one text; give a list of words, such as [{overrides!r}]")
    words = [f"curriculum={curriculum}", f"hardware={hardware}", f"nodes={nodes}", f"ranks={ranks}"]
    line = parse([*words, *(str(word) for word in overrides)])
    if line.help or line.cfg or line.multirun:
        raise UserError("plan: overrides are key=value and --config-dir FOLDER; other options are the command line's")
    values = compose("plan", line.overrides, line.folders)
    values["model"] = {**values["model"], "path": str(model), "init": None}  # any path, whatever Hydra's grammar allows
    config = replace(build(PlanConfig, values, origin="plan"), show="stages")
    return planned(config)


def _curriculum_file(name_or_path: str | Path) -> Path:
    from longctx.config.groups import choice_file, groups

    text = str(name_or_path)
    if text.endswith((".yaml", ".yml")) or "/" in text:
        if not Path(text).is_file():
            raise UserError(f"load_curriculum: {text} does not exist; name a YAML file with `stages: ...`")
        return Path(text)
    found = choice_file("curriculum", text)
    if found is None:
        known = groups().get("curriculum", [])
        near = nearest(text, known)
        hint = f"did you mean {near!r}? " if near else ""
        raise UserError(
            f"load_curriculum: {text!r} is not a curriculum that ships with longctx; {hint}known: {', '.join(known)}; "
            "or give the path of your own file, with its .yaml"
        )
    return found


def _read_yaml(file: Path) -> dict[str, Any]:
    import yaml

    from longctx.config.groups import broken

    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.MarkedYAMLError as error:
        raise UserError(broken(error, str(file))) from None
    if not isinstance(values, dict):
        raise UserError(f"{file} is not a mapping; a curriculum has `stages: {{NAME: {{seq_len: ...}}}}`")
    return {str(key): value for key, value in values.items()}
