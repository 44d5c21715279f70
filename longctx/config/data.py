"""What the data verbs and a training stage may say about documents: sources, mixes, packing, synthetic tasks.

A source is where documents come from; a mix names the share of every source in a stage and how long its
documents shall be there. Rules follow Fu et al. 2402.10171 (keep the domain mix, change length inside a
domain) and ProLong 2410.02660 (a share of full-length documents beside packed short ones).
"""

from __future__ import annotations

import string
from typing import Literal

from longctx.config.base import schema

TaskKind = Literal["needle", "needles", "chained", "table", "copy", "variables"]

_TEMPLATES: dict[str, tuple[str, str]] = {
    "needle": ("The pass key of {key} is {value}.", "What is the pass key of {key}? {value}"),
    "needles": ("The pass key of {key} is {value}.", "What is the pass key of {key}? {value}"),
    "chained": ("The pass key of {key} is {value}.", "Following the pass keys from {key} ends at {value}"),
    "table": ("{key}: {value}", "In the table, {key} has the value {value}"),
    "copy": ("", ""),
    "variables": ("VAR {key} = {value}.", "The variables that hold {key} are {value}"),
}


@schema
class SynthTask:
    """A synthetic task with known answers; see longctx.data.synth.

    count: needles, table rows, or (variables) chains; questions: how many of them are asked at the end;
    hops: links of a chain; depths: where in the haystack each needle goes (0 its start, 1 its end), None for
    random; answer_weight: the answers' loss weight over that of all other tokens together (None: 2, and every
    token alike for copy); other_weight: loss weight of a token that is no answer (0: only answers train).
    segment: tokens of a copied segment (None: random, up to half of the document).
    """

    kind: TaskKind = "needle"
    count: int = 1
    questions: int = 1
    hops: int = 3
    depths: tuple[float, ...] | None = None
    needle: str | None = None
    question: str | None = None
    answer_weight: float | None = None
    other_weight: float = 1.0
    segment: int | None = None

    def __post_init__(self) -> None:
        if self.count < 1 or self.questions < 1 or self.hops < 1:
            raise ValueError(
                f"count={self.count}, questions={self.questions} and hops={self.hops} must be 1 or more"
            )
        if self.questions > self.count and self.kind != "chained":
            raise ValueError(
                f"questions={self.questions} asks for more than the count={self.count} needles hold"
            )
        if self.kind in ("needle", "chained") and self.questions > 1:
            raise ValueError(
                f"questions={self.questions} does not fit kind={self.kind}, which asks one; use kind=needles"
            )
        if self.kind == "needle" and self.count != 1:
            raise ValueError(
                f"count={self.count} does not fit kind=needle, which hides one; use kind=needles"
            )
        if self.depths is not None:
            if not all(0 <= depth <= 1 for depth in self.depths):
                raise ValueError(f"depths={list(self.depths)} must lie between 0 (start) and 1 (end)")
            if len(self.depths) != self.inserts:
                raise ValueError(
                    f"depths={list(self.depths)} must name {self.inserts} places for kind={self.kind}"
                )
        if (self.answer_weight is not None and self.answer_weight < 0) or self.other_weight < 0:
            raise ValueError(
                f"answer_weight={self.answer_weight} and other_weight={self.other_weight} must be >= 0"
            )
        if self.segment is not None and self.segment < 1:
            raise ValueError(f"segment={self.segment} must be 1 token or more")
        for name in ("needle", "question"):
            _check_template(name, getattr(self, name))

    @property
    def inserts(self) -> int:
        """How many separate places of the haystack the task writes to."""
        return {"needle": 1, "needles": self.count, "chained": self.hops, "table": 1, "copy": 0,
                "variables": self.count * self.hops}[self.kind]  # fmt: skip

    @property
    def needle_template(self) -> str:
        return _TEMPLATES[self.kind][0] if self.needle is None else self.needle

    @property
    def question_template(self) -> str:
        return _TEMPLATES[self.kind][1] if self.question is None else self.question


def _check_template(name: str, template: str | None) -> None:
    if template is None:
        return
    try:
        fields = [field for _, field, _, _ in string.Formatter().parse(template) if field is not None]
    except ValueError as error:
        raise ValueError(
            f"{name}={template!r} is not a template: {error}; write {{key}} and {{value}}"
        ) from None
    if sorted(fields) != ["key", "value"]:
        raise ValueError(f"{name}={template!r} must hold {{key}} once and {{value}} once, and no other field")
