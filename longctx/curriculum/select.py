"""Selects and orders the stages of a curriculum, and reads the thetas that a search found for them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longctx.config.base import MOST_THETA, parse_count, parse_length
from longctx.config.curriculum import CurriculumConfig, StageConfig
from longctx.errors import UserError, nearest


@dataclass(frozen=True)
class FoundTheta:
    """A theta from a theta file, and the rule and length it was searched under (None: written by hand, any)."""

    theta: int
    rule: str | None
    seq_len: int | None


def selected(config: CurriculumConfig, file: str) -> dict[str, StageConfig]:
    """The stages that run, in order: sorted by length if all names are like s64k, otherwise as they are written."""
    wanted = config.only if config.only is not None else list(config.stages)
    for name in wanted:
        if name not in config.stages:
            near = nearest(name, config.stages)
            hint = f"did you mean {near!r}? " if near else ""
            raise UserError(
                f"curriculum.only names {name!r}, which is no stage; {hint}known: {', '.join(config.stages)} ({file})"
            )
    if not wanted:
        raise UserError(f"curriculum.only=[] leaves no stage; name one of {', '.join(config.stages)} ({file})")
    lengths = {name: _named_length(name) for name in config.stages}
    names = [name for name in config.stages if name in wanted]
    if all(length is not None for length in lengths.values()):
        names.sort(key=lambda name: lengths[name] or 0)
    return {name: config.stages[name] for name in names}


def read_theta_file(config: CurriculumConfig, file: str) -> dict[str, FoundTheta]:
    """Read the thetas by stage from the file that `longctx theta search=true` wrote; empty without a file."""
    if config.theta_file is None:
        return {}
    import yaml

    path = Path(config.theta_file)
    where = f"curriculum.theta_file={path}"
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"{where} cannot be read: {error.strerror}; `longctx theta search=true` writes it ({file})"
        ) from None
    except yaml.YAMLError:
        content = None
    stages = content.get("stages") if isinstance(content, dict) else None
    if not isinstance(stages, dict) or not all(isinstance(item, dict) and "theta" in item for item in stages.values()):
        raise UserError(f"{where} does not hold `stages: {{NAME: {{theta: NUMBER}}}}`; write it so ({path})")
    for name in stages:
        if name not in config.stages:
            near = nearest(name, config.stages)
            raise UserError(
                f"{where}: stage {name!r} is not in the curriculum; "
                + (f"did you mean {near!r}? " if near else "")
                + f"known: {', '.join(config.stages)} ({path})"
            )
    return {name: _found(item, f"{where}: stages.{name}", path) for name, item in stages.items()}


def _found(item: dict[str, Any], where: str, path: Path) -> FoundTheta:
    try:
        theta = parse_count(item["theta"])
    except ValueError as error:
        raise UserError(f"{where}.theta={item['theta']!r} {error} ({path})") from None
    if not 1 < theta < MOST_THETA:
        raise UserError(f"{where}.theta={theta} must be above 1 and below 2^63 ({path})")
    rule, seq_len = item.get("rule"), item.get("seq_len")
    try:
        seq_len = None if seq_len is None else parse_length(seq_len)
    except ValueError as error:
        raise UserError(f"{where}.seq_len={seq_len!r} {error} ({path})") from None
    return FoundTheta(theta, None if rule is None else str(rule), seq_len)


def _named_length(name: str) -> int | None:
    try:
        return parse_length(name[1:]) if name[:1] == "s" else None
    except ValueError:
        return None
