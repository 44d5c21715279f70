"""Every key of every verb: documented once, shown by `--help`, and read by some part of the package."""

from __future__ import annotations

import ast
import dataclasses
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import pytest

import longctx
from longctx.config.compose import resolve
from longctx.config.help import field_docs, keys
from longctx.config.keys import alias, members, variants
from longctx.verbs import VERBS

PACKAGE = Path(longctx.__file__).parent


def sections(kind: Any, known: set[Any]) -> Iterator[Any]:
    """Each dataclass below `kind`, once."""
    for member in members(kind):
        if dataclasses.is_dataclass(member):
            if member not in known:
                known.add(member)
                yield member
                for hint in get_type_hints(member, include_extras=True).values():
                    yield from sections(hint, known)
        elif get_origin(member) in (dict, list, tuple):
            for inside in get_args(member):
                yield from sections(inside, known)


FOUND: set[Any] = set()
SECTIONS = [section for verb in VERBS.values() for section in sections(resolve(verb.schema), FOUND)]


def is_section(kind: Any) -> bool:
    """Whether a key has keys of its own; the docstring of its class documents it then."""
    return next(sections(kind, set()), None) is not None


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.__name__)
def test_every_key_is_documented(section):
    hints, docs = get_type_hints(section, include_extras=True), field_docs(section)
    rule = "name" if hasattr(section, "to_hf") else ""  # the rule's class says what a rule is
    bare = [f.name for f in dataclasses.fields(section) if not docs.get(f.name) and not is_section(hints[f.name])]
    assert [name for name in bare if name != rule] == []
    assert section.__doc__
    assert not section.__doc__.startswith(f"{section.__name__}(")  # a dataclass without a docstring gets its signature


@pytest.mark.parametrize("name", sorted(VERBS))
def test_help_shows_every_key_once(name):
    verb = VERBS[name]
    rows = keys(verb)
    shown = Counter(key for key, *_ in rows if "=" not in key)
    assert {key: often for key, often in shown.items() if often > 1} == {}
    for section in sections(resolve(verb.schema), set()):
        if not hasattr(section, "to_hf"):  # a rule's parameters stand in one row
            last = {key.rpartition(".")[2] for key in shown} | {part for key in shown for part in key.split(".")}
            assert {alias(field) for field in dataclasses.fields(section)} <= last, section.__name__


def read_names() -> set[str]:
    """Attributes that the package reads; `getattr(x, "name")` counts."""
    names: set[str] = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                names.add(node.attr)
    return names


def test_every_key_is_read():
    read = read_names()
    assert [f"{s.__name__}.{f.name}" for s in SECTIONS for f in dataclasses.fields(s) if f.name not in read] == []


def test_rules_are_told_apart_by_name():
    for section in SECTIONS:
        for hint in get_type_hints(section, include_extras=True).values():
            names = [getattr(one, "name", None) for one in variants(hint)]
            assert len(set(names)) == len(names)
