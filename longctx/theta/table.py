"""The rows of `longctx theta`: for each stage the chosen theta beside every other rule's, and what each
supports.

Every column of "other rules" is a whole curriculum of its own: the rule begins at the model and, where it
goes from stage to stage, continues from its own previous value, so that the numbers are those the rule's
users quote.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from longctx.curriculum import Stage
from longctx.errors import UserError
from longctx.rope import (
    PUBLISHED_BOUNDS,
    RULES,
    THETA_ONLY,
    Rope,
    apply,
    critical_dimension,
    dims_beyond,
    make_rule,
    supported_length,
)


@dataclass(frozen=True)
class Alternative:
    """What another rule gives at a stage; why: the reason when it gives nothing."""

    theta: float | None = None
    supported_length: int | None = None
    checked_to: int = 0
    rope_parameters: dict[str, Any] | None = None
    why: str | None = None


@dataclass(frozen=True)
class StageRow:
    """One stage. supported_length: None when no distance up to checked_to fails. dims: two a pair."""

    name: str
    seq_len: int
    start_window: int
    theta: float
    rule: str
    supported_length: int | None
    checked_to: int
    dims: int
    dims_beyond_window: int
    dims_beyond_before: int
    critical_dimension: int
    published_bound: float | None
    rope_parameters: dict[str, Any]
    rules: dict[str, Alternative] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


def rows(stages: Sequence[Stage], rope: Rope, rules: Sequence[str]) -> list[StageRow]:
    """A row per resolved stage. rope: the model's own. rules: what chose each stage's theta."""
    lengths = [stage.seq_len for stage in stages]
    others = {name: alternatives(name, rope, lengths) for name in RULES if name != "longrope"}
    before, found = rope, []
    for index, (stage, rule) in enumerate(zip(stages, rules, strict=True)):
        after = Rope(stage.rope, rope.head_dim, stage.seq_len, rope.source)
        limit = max(2**20, stage.seq_len)
        supported = supported_length(after.frequencies(), limit)
        found.append(
            StageRow(
                name=stage.name,
                seq_len=stage.seq_len,
                start_window=stage.start_window,
                theta=stage.theta,
                rule=rule,
                supported_length=supported,
                checked_to=limit,
                dims=after.dim,
                dims_beyond_window=dims_beyond(after.frequencies(), stage.seq_len),
                dims_beyond_before=dims_beyond(before.frequencies(), stage.seq_len),
                critical_dimension=critical_dimension(before.theta, before.window, before.dim),
                published_bound=PUBLISHED_BOUNDS.get(stage.seq_len),
                rope_parameters=dict(stage.rope),
                rules={name: column[index] for name, column in others.items()},
                warnings=_warnings(stage, supported),
            )
        )
        before = after
    return found


def alternatives(name: str, rope: Rope, lengths: Sequence[int]) -> list[Alternative]:
    """What rule `name` gives at each length, going its own way from the model's rope."""
    rule = make_rule(name, {})
    found: list[Alternative] = []
    at = rope
    for length in lengths:
        try:
            parameters = apply(rule, at if rule.start == "previous" else rope, length)
        except UserError as error:
            found.append(Alternative(why=str(error)))
            continue
        at = Rope(parameters, rope.head_dim, length, rope.source)
        limit = 2 * length
        theta = parameters["rope_theta"] if name in THETA_ONLY else None
        found.append(Alternative(theta, supported_length(at.frequencies(), limit), limit, parameters))
    return found


def _warnings(stage: Stage, supported: int | None) -> tuple[str, ...]:
    if supported is None or supported >= stage.seq_len:
        return ()
    return (
        f"{stage.name}: theta {stage.theta:,.0f} supports {supported:,} tokens, fewer than the stage's "
        f"{stage.seq_len:,} (2405.14591): beyond that distance RoPE prefers far tokens that are unlike to "
        "those that are alike; take a larger theta",
    )
