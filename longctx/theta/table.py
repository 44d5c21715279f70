"""The rows of `longctx theta`: for each stage the chosen theta, and what every other rule gives instead.

Each other rule is applied to the whole curriculum by itself: it starts at the model, and a rule that goes from stage
to stage continues from its own previous theta. So the numbers are those that a user of that rule gets.
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
    """The result of another rule at a stage; `why` is the reason when the rule does not apply."""

    theta: float | None = None
    supported_length: int | None = None
    checked_to: int = 0
    rope_parameters: dict[str, Any] | None = None
    why: str | None = None


@dataclass(frozen=True)
class StageRow:
    """One stage of the table.

    Lengths are in tokens. supported_length: None when theta supports every distance up to checked_to. dims, dims_*:
    numbers of rotary dimensions, two for each pair.
    """

    name: str
    seq_len: int
    window: int
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
    """Make a row for each resolved stage. rope: the model's. rules: the name of each stage's rule."""
    windows = [stage.window for stage in stages]
    others = {name: alternatives(name, rope, windows) for name in RULES if name != "longrope"}
    before, found = rope, []
    for index, (stage, rule) in enumerate(zip(stages, rules, strict=True)):
        after = Rope(stage.rope, rope.head_dim, stage.window, rope.source)
        limit = max(2**20, stage.seq_len)
        supported = supported_length(after.frequencies(), limit)
        found.append(
            StageRow(
                name=stage.name,
                seq_len=stage.seq_len,
                window=stage.window,
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
    """Apply rule `name` to each length in turn, starting from the model's rope."""
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
        f"{stage.seq_len:,} (2405.14591): beyond that distance RoPE gives dissimilar tokens more weight than similar "
        "ones; take a larger theta",
    )
