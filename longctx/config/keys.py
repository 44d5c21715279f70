"""The keys of a schema: which there are, which types they take, and which one a wrong key may have meant.

A schema is a dataclass of longctx.config, a type is whatever one of its fields is annotated with.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from longctx.config.renamed import renamed
from longctx.errors import nearest


@cache
def hints_of(section: Any) -> dict[str, Any]:
    """The types of a schema's fields, with their ranges."""
    return get_type_hints(section, include_extras=True)


def step_into(kind: Any, part: str) -> Any:
    """The type of key `part` inside the type `kind`, or None when there is no such key."""
    for candidate in members(kind):
        if dataclasses.is_dataclass(candidate):
            hints = hints_of(candidate)
            for field in dataclasses.fields(candidate):
                if alias(field) == part:
                    return hints[field.name]
        elif get_origin(candidate) is dict:
            return get_args(candidate)[1]
        elif get_origin(candidate) in (list, tuple) and part.isdigit():
            return get_args(candidate)[0]
    return None


def type_at(kind: Any, path: Sequence[str]) -> Any:
    """The type of the key at `path`, part by part, inside schema `kind`."""
    for part in path:
        kind = step_into(kind, part)
    return kind


def known_keys(kind: Any, path: Sequence[str] = ()) -> list[str]:
    """The keys that may stand at `path` inside schema `kind`; empty where any name may."""
    sections = [candidate for candidate in members(type_at(kind, path)) if dataclasses.is_dataclass(candidate)]
    return list(dict.fromkeys(alias(field) for section in sections for field in dataclasses.fields(section)))


def members(kind: Any) -> list[Any]:
    """The types that `kind` allows: `X | None`, Annotated[X, ...] and X itself, flattened."""
    if get_origin(kind) is Annotated:
        return members(get_args(kind)[0])
    if get_origin(kind) in (list, dict, tuple, Literal) or dataclasses.is_dataclass(kind):
        return [kind]
    flat: list[Any] = []
    for argument in get_args(kind):
        flat += members(argument)
    return flat or [kind]


def variants(kind: Any) -> list[Any]:
    """The dataclasses of a tagged union, each known by its `name`; empty for any other type."""
    found = [candidate for candidate in members(kind) if dataclasses.is_dataclass(candidate)]
    return found if len(found) > 1 else []


def alias(field: dataclasses.Field[Any]) -> str:
    """The key users write for a field."""
    return getattr(field.default, "alias", None) or field.name


def keys_ending(kind: Any, tail: Sequence[str], path: tuple[str, ...] = ()) -> Iterator[str]:
    """The keys anywhere inside schema `kind` that end with these parts; NAME stands for a name that a user chooses."""
    if path[len(path) - len(tail) :] == tuple(tail) and len(path) > len(tail):
        yield ".".join(path)
    for candidate in members(kind):
        if dataclasses.is_dataclass(candidate):
            hints = hints_of(candidate)
            for field in dataclasses.fields(candidate):
                yield from keys_ending(hints[field.name], tail, (*path, alias(field)))
        elif get_origin(candidate) is dict:
            yield from keys_ending(get_args(candidate)[1], tail, (*path, "NAME"))


def unknown_key_message(where: str, known: Iterable[str], root: Any = None, tail: Sequence[str] = ()) -> str:
    """The message for a key that does not exist: its new name, a key elsewhere that ends alike, or the nearest one.

    A key of the same section that holds the name as a word comes before those elsewhere.

    root: the schema in which keys elsewhere are looked for. tail: the parts that a user wrote after `where`.
    """
    known = list(known)
    if new := renamed(where, known):
        return f"{where} {new}"
    written = [*where.split("."), *tail]
    section, _, last = where.rpartition(".")
    beside = [f"{section}.{key}" for key in known if section and not tail and last in key.split("_")]
    for start in range(where.count(".") + 1):
        found = sorted(set(keys_ending(root, written[start:]))) if root else []
        highest = min((key.count(".") for key in found), default=0)
        places = [key for key in found if key.count(".") == highest]
        if 0 < len(places) <= 2:
            return f"{where} is not a known key; did you mean {' or '.join([*beside, *places])}?"
    near = nearest(last, known)
    full = f"{section}.{near}" if section else near
    hint = f"did you mean {full}?" if near else f"known keys: {', '.join(known)}"
    return f"{where} is not a known key; {hint}"
