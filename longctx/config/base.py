"""What every schema is made of: frozen dataclasses, numbers with units, and errors that name the remedy.

YAML and the command line give a plain dict; `build` turns it into the verb's dataclass or raises a UserError
that says where the value stands, which rule it breaks and what the nearest known key is. Validation never
changes a value other than reading its unit.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from pydantic import BeforeValidator, ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as _pydantic_dataclass
from typing_extensions import dataclass_transform

from longctx.errors import UserError, nearest

T = TypeVar("T")

Format = Literal["text", "json"]

# Names people use for powers of two from 2^16 to 2^22 (Gradient's model names among them).
_CUSTOMARY = {"65k": 2**16, "131k": 2**17, "262k": 2**18, "524k": 2**19, "1048k": 2**20, "2097k": 2**21}
_CUSTOMARY["4194k"] = 2**22


@dataclass_transform(frozen_default=True, kw_only_default=True)
def schema(cls: type[T]) -> type[T]:
    """A frozen keyword-only dataclass that refuses unknown keys; field aliases (`from`) are accepted."""
    made: Any = _pydantic_dataclass(
        frozen=True,
        kw_only=True,
        config=ConfigDict(extra="forbid", populate_by_name=True, arbitrary_types_allowed=False),
    )
    return made(cls)


def parse_length(value: Any) -> Any:
    """A length in tokens: 8192, "64k" (k = 1024), "1M" (2^20), or a customary name such as "262k"."""
    if isinstance(value, bool):
        raise ValueError("is not a length; write 8192, 64k or 1M")
    if isinstance(value, str):
        text = value.strip().replace("_", "")
        if text.lower() in _CUSTOMARY:
            return _CUSTOMARY[text.lower()]
        match = re.fullmatch(r"(\d+(?:\.\d+)?)([kKmM]?)", text)
        if not match:
            raise ValueError("is not a length; write 8192, 64k or 1M")
        number = float(match[1]) * {"": 1, "k": 2**10, "m": 2**20}[match[2].lower()]
        if number != int(number):
            raise ValueError("is not a whole number of tokens")
        return int(number)
    return _whole(value, "a length; write 8192, 64k or 1M")


def parse_count(value: Any) -> Any:
    """A count of tokens or bytes: 100000000, 1e8 or "100M" (powers of ten)."""
    if isinstance(value, bool):
        raise ValueError("is not a count; write 100000000, 1e8 or 100M")
    if isinstance(value, str):
        match = re.fullmatch(r"(\d+(?:\.\d+)?(?:[eE]\d+)?)([kKmMbBgGtT]?)", value.strip().replace("_", ""))
        if not match:
            raise ValueError("is not a count; write 100000000, 1e8 or 100M")
        scale = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9, "t": 10**12}[match[2].lower()]
        value = float(match[1]) * scale
    return _whole(value, "a count; write 100000000, 1e8 or 100M")


def _whole(value: Any, what: str) -> Any:
    if isinstance(value, int):
        return value
    if isinstance(value, float) and value == int(value):
        return int(value)
    raise ValueError(f"is not {what}")


def _text(value: Any) -> Any:
    """Hydra reads `run=1e5` or `name=007` as numbers; where text is expected the user's digits are meant."""
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


Length = Annotated[int, BeforeValidator(parse_length)]
Count = Annotated[int, BeforeValidator(parse_count)]
Text = Annotated[str, BeforeValidator(_text)]


def build(kind: type[T], values: Mapping[str, Any], *, origin: str) -> T:
    """Turn a plain dict into the schema `kind`.

    origin: the file the values came from, for the message.
    Raises UserError with one line per mistake, at most five.
    """
    try:
        return TypeAdapter(kind).validate_python(dict(values))
    except ValidationError as error:
        details = error.errors(include_url=False)
        lines = [_explain(kind, item, origin) for item in details[:5]]
        if len(details) > 5:
            lines.append(f"... and {len(details) - 5} more")
        raise UserError("\n".join(lines)) from None


def known_keys(kind: Any, path: tuple[Any, ...]) -> list[str]:
    """The keys that may stand at `path` inside schema `kind`."""
    for part in path:
        kind = _step_into(kind, part)
    for candidate in _choices(kind):
        if dataclasses.is_dataclass(candidate):
            return [_alias(field) for field in dataclasses.fields(candidate)]
    return []


def _alias(field: dataclasses.Field[Any]) -> str:
    return getattr(field.default, "alias", None) or field.name


def _choices(kind: Any) -> list[Any]:
    """`X | None`, Annotated[X, ...] and X itself, flattened."""
    if get_origin(kind) is Annotated:
        return _choices(get_args(kind)[0])
    if get_origin(kind) in (list, dict, tuple) or dataclasses.is_dataclass(kind):
        return [kind]
    flat: list[Any] = []
    for argument in get_args(kind):
        flat += _choices(argument)
    return flat or [kind]


def _step_into(kind: Any, part: Any) -> Any:
    for candidate in _choices(kind):
        if dataclasses.is_dataclass(candidate) and isinstance(part, str):
            hints = get_type_hints(candidate, include_extras=True)
            by_alias = {_alias(field): field.name for field in dataclasses.fields(candidate)}
            name = by_alias.get(part, part)
            if name in hints:
                return hints[name]
        elif get_origin(candidate) is dict:
            return get_args(candidate)[1]
        elif get_origin(candidate) in (list, tuple):
            return get_args(candidate)[0]
    return None


def _explain(kind: Any, item: Mapping[str, Any], origin: str) -> str:
    # pydantic adds the name of a union's member to the location; users know only the keys they wrote.
    location = [part for part in item["loc"] if not (isinstance(part, str) and not re.match(r"^[\w-]+$", part))]
    location = [part for part in location if not (isinstance(part, str) and re.match(r"^[A-Z]\w*Config$", part))]
    where = ".".join(str(part) for part in location)
    value = item.get("input")
    if item["type"] == "unexpected_keyword_argument":
        known = known_keys(kind, tuple(location[:-1]))
        near = nearest(str(location[-1]), known)
        hint = f"did you mean {near!r}?" if near else f"known keys: {', '.join(known)}"
        return f"{where} is not a known key; {hint} ({origin})"
    if item["type"] in ("missing", "missing_argument", "missing_keyword_only_argument"):
        return f"{where} is missing; give it as {where}=... on the command line or in the file ({origin})"
    message = item["msg"].removeprefix("Value error, ")
    shown = repr(value) if not isinstance(value, Mapping) else "{...}"
    if item["type"] == "value_error":
        return f"{where}={shown} {message} ({origin})" if where else f"{message} ({origin})"
    if item["type"] == "literal_error":
        return f"{where}={shown} is not one of {item['ctx']['expected']} ({origin})"
    return f"{where}={shown} is not valid: {message[0].lower()}{message[1:]} ({origin})"
