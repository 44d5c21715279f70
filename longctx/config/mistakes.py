"""Puts the mistakes that pydantic finds in a config into words: the key and its value, the rule, and what to write."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from longctx.config.keys import known_keys, step_into, type_at, unknown_key_message, variants
from longctx.config.renamed import INSTEAD
from longctx.errors import nearest

_SHOWN = 5  # mistakes, a line each; the others are counted
_ABOUT_A_KEY = ("unexpected_keyword_argument", "missing", "missing_argument", "missing_keyword_only_argument")
_BOUNDS = {"greater_than_equal": "{ge} or more", "greater_than": "above {gt}", "less_than_equal": "at most {le}",
           "less_than": "below {lt}", "multiple_of": "a multiple of {multiple_of}",
           "finite_number": "a finite number"}  # fmt: skip
_WANTED = {"int": "a whole number", "float": "a number", "bool": "true or false", "string": "text",
           "dict": "a mapping"}  # fmt: skip


def explain(error: ValidationError, schema: Any, values: Any, origin: str) -> str:
    """One line per mistake in `values`, given for `schema`; origin: the file they came from."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for item in error.errors(include_url=False):
        found.setdefault(".".join(_location(schema, item)), []).append(item)
    mistakes = [_Mistake(schema, values, where, items) for where, items in found.items()]
    lines = [f"{_WORDS.get(one.kind, _of_another_type)(one)} ({origin})" for one in mistakes[:_SHOWN]]
    return "\n".join(lines + ([f"... and {len(mistakes) - _SHOWN} more"] if len(mistakes) > _SHOWN else []))


@dataclass(frozen=True)
class _Mistake:
    """A key whose value is refused.

    schema, values: of the whole config. where: the key, such as curriculum.stages.s64k.tokens. items: pydantic's
    errors about it, one for each type that its value could have had.
    """

    schema: Any
    values: Any
    where: str
    items: list[Mapping[str, Any]]

    @property
    def kind(self) -> str:
        """pydantic's name of the mistake."""
        return self.items[0]["type"]

    @property
    def value(self) -> Any:
        return self.items[0].get("input")

    @property
    def context(self) -> Mapping[str, Any]:
        """What pydantic says of the constraint: a bound, or the names that are allowed."""
        return self.items[0].get("ctx", {})

    @property
    def parts(self) -> list[str]:
        return self.where.split(".") if self.where else []

    @property
    def given(self) -> str:
        """KEY=VALUE; a section is not written out."""
        return f"{self.where}={'{...}' if isinstance(self.value, Mapping) else repr(self.value)}"


def _location(kind: Any, item: Mapping[str, Any]) -> list[str]:
    """The keys a user wrote: pydantic also names the union's member that it tried."""
    path: list[str] = []
    for index, part in enumerate(map(str, item["loc"])):
        inside = step_into(kind, part)
        if inside is not None:
            path, kind = [*path, part], inside
        elif item["type"] in _ABOUT_A_KEY and index == len(item["loc"]) - 1:
            path = [*path, part]
        else:
            kind = next((one for one in variants(kind) if one.name == part), kind)
    return path


def _unknown_key(mistake: _Mistake) -> str:
    section = mistake.parts[:-1]
    for rule in variants(type_at(mistake.schema, section)):
        if rule.name == mistake.items[0]["loc"][-2]:
            known = [key for key in known_keys(rule) if key not in ("name", "start")]
            takes = f"{', '.join(known)}, start" if known else "no parameters but start"
            return f"{mistake.given} does not belong to rule {rule.name!r}; it takes {takes}"
    return unknown_key_message(mistake.where, known_keys(mistake.schema, section))


def _missing_key(mistake: _Mistake) -> str:
    """The key may lie in a section beside this one, whose name the user meant: stages.s64k beside a misspelled s64."""
    hint = ""
    if len(mistake.parts) > 2:
        *above, section, _ = mistake.parts
        beside = mistake.values
        for part in above:
            beside = beside[part] if isinstance(beside, Mapping) else {}
        if near := nearest(section, [name for name in beside if name != section]):
            hint = f"; or did you mean {'.'.join([*above, near])}?"
    return f"{mistake.where} is missing; give it as {mistake.where}=... on the command line or in the file{hint}"


def _unknown_rule(mistake: _Mistake) -> str:
    tag, known = mistake.context["tag"], mistake.context["expected_tags"]
    near = nearest(str(tag), _quoted(known))
    hint = f"did you mean {near!r}? " if near else ""
    return f"{mistake.where}={tag!r} is not a rule; {hint}known: {known}"


def _no_rule(mistake: _Mistake) -> str:
    return f"{mistake.given} does not say which rule; give it as {mistake.where}=NAME"


def _failed_check(mistake: _Mistake) -> str:
    """What a schema's own check says, of the value or, if it begins with a key's name, of that key inside."""
    message = mistake.items[0]["msg"].removeprefix("Value error, ")
    if not isinstance(mistake.value, Mapping):
        return f"{mistake.given} {message}"
    if not mistake.where:
        return message
    first = re.match(r"\w+", message)
    inside = first is not None and first[0] in known_keys(mistake.schema, mistake.parts)
    return f"{mistake.where}{'.' if inside else ': '}{message}"


def _not_a_section(mistake: _Mistake) -> str:
    first = known_keys(mistake.schema, mistake.parts)[0]
    return f"{mistake.given} stands for a whole section; give its keys, such as {mistake.where}.{first}=..."


def _empty(mistake: _Mistake) -> str:
    return f"{mistake.given} is empty; give it a value"


def _out_of_bounds(mistake: _Mistake) -> str:
    bounds = {key: f"{limit:,}" if isinstance(limit, int) else f"{limit:g}" for key, limit in mistake.context.items()}
    return f"{mistake.where}={_written(mistake)!r} must be {_BOUNDS[mistake.kind].format(**bounds)}"


def _not_a_list(mistake: _Mistake) -> str:
    return f"{mistake.given} is not a list; write '{mistake.where}=[{mistake.value}]'"


def _of_another_type(mistake: _Mistake) -> str:
    return f"{mistake.given} is not {' or '.join(map(_wanted, mistake.items))}{_meant(mistake)}"


_WORDS: dict[str, Callable[[_Mistake], str]] = {
    **dict.fromkeys(_ABOUT_A_KEY, _missing_key),
    "unexpected_keyword_argument": _unknown_key,
    "union_tag_invalid": _unknown_rule,
    "union_tag_not_found": _no_rule,
    "value_error": _failed_check,
    "dataclass_type": _not_a_section,
    **dict.fromkeys(("string_too_short", "too_short"), _empty),
    **dict.fromkeys(_BOUNDS, _out_of_bounds),
    **dict.fromkeys(("list_type", "tuple_type"), _not_a_list),
}


def _written(mistake: _Mistake) -> Any:
    """The value as a user wrote it: "0k" or 1e99, which a bound sees as a whole number."""
    values = mistake.values
    for part in mistake.parts:
        if isinstance(values, list | tuple) and part.isdigit():
            values = values[int(part)]
        else:
            values = values.get(part) if isinstance(values, Mapping) else None
    return values if isinstance(values, str | float) else mistake.value


def _wanted(item: Mapping[str, Any]) -> str:
    """What the type that refused a value takes."""
    if item["type"] == "literal_error":
        return f"one of {item['ctx']['expected']}" if "," in item["ctx"]["expected"] else item["ctx"]["expected"]
    if (
        item["type"].endswith(("_type", "_parsing", "_parsing_size", "_from_float"))
        and item["type"].split("_")[0] in _WANTED
    ):
        return _WANTED[item["type"].split("_")[0]]
    return f"valid: {item['msg'][0].lower()}{item['msg'][1:]}"


def _meant(mistake: _Mistake) -> str:
    """The nearest of the words that a choice allows."""
    choices = [item["ctx"]["expected"] for item in mistake.items if item["type"] == "literal_error"]
    words = [word for choice in choices for word in _quoted(choice)]
    value = str(mistake.value)
    if instead := INSTEAD.get(f"{mistake.where.rpartition('.')[2]}={value}"):
        return f"; instead: {instead}"
    near = nearest(value, words)
    return f"; did you mean {mistake.where}={near}?" if near else ""


def _quoted(listed: str) -> list[str]:
    """The values in pydantic's "'a', 'b' or 'c'"."""
    return re.findall(r"'([^']+)'", listed)
