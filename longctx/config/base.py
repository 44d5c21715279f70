"""What every schema is made of: frozen dataclasses, numbers with units, and errors that name the remedy.

YAML and the command line give a plain dict; `build` turns it into the verb's dataclass or raises a UserError
that says where the value stands, which rule it breaks and what the nearest known key is. Validation never
changes a value other than reading its unit.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from numbers import Integral
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as _pydantic_dataclass
from pydantic_core import PydanticKnownError
from typing_extensions import dataclass_transform

from longctx.config.renamed import INSTEAD, renamed
from longctx.errors import UserError, nearest

T = TypeVar("T")

Format = Literal["text", "json"]

# Names people use for powers of two from 2^16 to 2^22 (Gradient's model names among them).
_CUSTOMARY = {"65k": 2**16, "131k": 2**17, "262k": 2**18, "524k": 2**19, "1048k": 2**20, "2097k": 2**21}
_CUSTOMARY["4194k"] = 2**22
# Short names of dtypes, accepted by every key that takes one.
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32", "float": "float32"}
DTYPES |= {"fp64": "float64", "double": "float64", **{f"torch.{name}": name for name in set(DTYPES.values())}}


@dataclass_transform(frozen_default=True, kw_only_default=True)
def schema(cls: type[T]) -> type[T]:
    """A frozen keyword-only dataclass that refuses unknown keys, nan and inf; field aliases (`from`) are accepted."""
    made: Any = _pydantic_dataclass(
        frozen=True,
        kw_only=True,
        config=ConfigDict(extra="forbid", populate_by_name=True, defer_build=True, allow_inf_nan=False),
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
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, float) and value.is_integer():
        return int(value)
    raise ValueError(f"is not {what}")


def _text(value: Any) -> Any:
    """Hydra reads `run=1e5` or `name=007` as numbers; where text is expected the user's digits are meant."""
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


def _whole_not_bool(value: Any) -> Any:
    """Pydantic reads true as 1, which is a mistake where a number is expected, and has no words for 1e99."""
    if isinstance(value, bool):
        raise PydanticKnownError("int_type")
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _float_not_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise PydanticKnownError("float_type")
    return value


# The numbers of the schemas. A key takes one of these, or one of these with a narrower range, and never a bare int or
# float, so that its range is checked when the config is composed. The upper bounds are those of what computes with the
# numbers: torch's 32-bit sizes, numpy's 64-bit counts, the timers of sockets.
MOST = 2**31 - 1
LONGEST = 2**28  # tokens of a sequence
MOST_THETA = 2**63  # transformers computes with theta as a 64-bit number
Whole = Annotated[int, BeforeValidator(_whole_not_bool)]
Number = Annotated[float, BeforeValidator(_float_not_bool)]
Length = Annotated[int, BeforeValidator(parse_length), Field(ge=1, le=LONGEST)]
LengthOrZero = Annotated[int, BeforeValidator(parse_length), Field(ge=0, le=LONGEST)]
Window = Annotated[int, BeforeValidator(parse_length), Field(ge=2, le=LONGEST)]  # a token to read, one to predict
Count = Annotated[int, BeforeValidator(parse_count), Field(ge=1, le=10**18)]
Theta = Annotated[int, BeforeValidator(parse_count), Field(gt=1, lt=MOST_THETA)]
Text = Annotated[str, BeforeValidator(_text)]
Given = Annotated[Text, Field(min_length=1)]  # such as a path, where the empty text would be the current folder
Positive = Annotated[Whole, Field(ge=1, le=MOST)]
NotNegative = Annotated[Whole, Field(ge=0, le=MOST)]
Samples = Annotated[Whole, Field(ge=1, le=100_000)]  # sequences or questions of a measurement
Layers = Annotated[Whole, Field(ge=1, le=10_000)]
Width = Annotated[Whole, Field(ge=1, le=2**24)]  # of a layer, a head or a vocabulary, and the number of heads
PerMachine = Annotated[Whole, Field(ge=1, le=4096)]  # processes, ranks or threads of one machine
MachineCount = Annotated[Whole, Field(ge=1, le=10**6)]
HeadDim = Annotated[Whole, Field(ge=2, le=8192, multiple_of=2)]  # rotary embeddings turn pairs of dimensions
Seed = Annotated[Whole, Field(ge=0, lt=2**63)]
AboveZero = Annotated[Number, Field(gt=0, le=1e15)]
ZeroOrMore = Annotated[Number, Field(ge=0, le=1e15)]
Share = Annotated[Number, Field(ge=0, le=1)]
ShareAboveZero = Annotated[Number, Field(gt=0, le=1)]
Seconds = Annotated[Number, Field(gt=0, le=1e6)]
Minutes = Annotated[Number, Field(gt=0, le=1e4)]
Epsilon = Annotated[Number, Field(ge=1e-30, le=1)]  # float32 holds no number much smaller
AsDtype = BeforeValidator(lambda value: DTYPES.get(value.lower(), value) if isinstance(value, str) else value)
AsList = BeforeValidator(lambda value: value if isinstance(value, list | tuple) else [value])


def build(kind: type[T], values: Mapping[str, Any], *, origin: str) -> T:
    """Turn a plain dict into the schema `kind`.

    origin: the file the values came from, for the message.
    Raises UserError with one line per mistake, at most five.
    """
    try:
        return adapter_of(kind).validate_python(dict(values))
    except ValidationError as error:
        mistakes: dict[str, list[Any]] = {}
        for item in error.errors(include_url=False):
            where = ".".join(_location(kind, item))
            mistakes.setdefault(where, []).append(item)
        lines = [_explain(kind, values, where, items, origin) for where, items in list(mistakes.items())[:5]]
        if len(mistakes) > 5:
            lines.append(f"... and {len(mistakes) - 5} more")
        raise UserError("\n".join(lines)) from None


@cache
def adapter_of(kind: type[T]) -> TypeAdapter[T]:
    """Build a schema's validator once per process."""
    return TypeAdapter(kind)


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


def _at(kind: Any, path: Sequence[str]) -> Any:
    for part in path:
        kind = step_into(kind, part)
    return kind


def known_keys(kind: Any, path: Sequence[str] = ()) -> list[str]:
    """The keys that may stand at `path` inside schema `kind`; empty where any name may."""
    sections = [candidate for candidate in members(_at(kind, path)) if dataclasses.is_dataclass(candidate)]
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


def unknown(where: str, known: Iterable[str], origin: str, root: Any = None, tail: Sequence[str] = ()) -> str:
    """The message for a key that does not exist: its new name, a key elsewhere that ends alike, or the nearest one.

    A key of the same section that holds the name as a word comes before those elsewhere.

    root: the schema in which keys elsewhere are looked for. tail: the parts that a user wrote after `where`.
    """
    known = list(known)
    if new := renamed(where, known):
        return f"{where} {new} ({origin})"
    written = [*where.split("."), *tail]
    section, _, last = where.rpartition(".")
    beside = [f"{section}.{key}" for key in known if section and not tail and last in key.split("_")]
    for start in range(where.count(".") + 1):
        found = sorted(set(keys_ending(root, written[start:]))) if root else []
        highest = min((key.count(".") for key in found), default=0)
        places = [key for key in found if key.count(".") == highest]
        if 0 < len(places) <= 2:
            return f"{where} is not a known key; did you mean {' or '.join([*beside, *places])}? ({origin})"
    near = nearest(last, known)
    hint = f"did you mean {near!r}?" if near else f"known keys: {', '.join(known)}"
    return f"{where} is not a known key; {hint} ({origin})"


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


_ABOUT_A_KEY = ("unexpected_keyword_argument", "missing", "missing_argument", "missing_keyword_only_argument")
_BOUNDS = {"greater_than_equal": "{ge} or more", "greater_than": "above {gt}", "less_than_equal": "at most {le}",
           "less_than": "below {lt}", "multiple_of": "a multiple of {multiple_of}",
           "finite_number": "a finite number"}  # fmt: skip
_WANTED = {"int": "a whole number", "float": "a number", "bool": "true or false", "string": "text",
           "dict": "a mapping"}  # fmt: skip


def _explain(kind: Any, values: Any, where: str, items: list[Mapping[str, Any]], origin: str) -> str:
    item = items[0]
    value, context = item.get("input"), item.get("ctx", {})
    shown = "{...}" if isinstance(value, Mapping) else repr(value)
    if item["type"] == "unexpected_keyword_argument":
        for one in variants(_at(kind, where.split(".")[:-1])):
            if one.name == item["loc"][-2]:
                known = [key for key in known_keys(one) if key not in ("name", "start")]
                takes = f"{', '.join(known)}, start" if known else "no parameters but start"
                return f"{where}={shown} does not belong to rule {one.name!r}; it takes {takes} ({origin})"
        return unknown(where, known_keys(kind, where.split(".")[:-1]), origin)
    if item["type"] in _ABOUT_A_KEY:
        *parents, section, _ = ["", "", *where.split(".")]
        for part in parents[2:]:
            values = values[part] if isinstance(values, Mapping) else {}
        near = nearest(section, [name for name in values if name != section]) if parents[2:] else None
        hint = f"; or did you mean {'.'.join([*parents[2:], near])}?" if near else ""
        return f"{where} is missing; give it as {where}=... on the command line or in the file{hint} ({origin})"
    if item["type"] == "union_tag_invalid":
        near = nearest(str(context["tag"]), _quoted(context["expected_tags"]))
        hint = f"did you mean {near!r}? " if near else ""
        return f"{where}={context['tag']!r} is not a rule; {hint}known: {context['expected_tags']} ({origin})"
    if item["type"] == "union_tag_not_found":
        return f"{where}={shown} does not say which rule; give it as {where}=NAME ({origin})"
    if item["type"] == "value_error":
        message = item["msg"].removeprefix("Value error, ")
        if not isinstance(value, Mapping):
            return f"{where}={shown} {message} ({origin})"
        first = re.match(r"\w+", message)
        inside = first is not None and first[0] in known_keys(kind, where.split(".") if where else [])
        return f"{where}{('.' if inside else ': ') if where else ''}{message} ({origin})"
    if item["type"] == "dataclass_type":
        first = known_keys(kind, where.split("."))[0]
        return f"{where}={shown} stands for a whole section; give its keys, such as {where}.{first}=... ({origin})"
    if item["type"] in ("string_too_short", "too_short"):
        return f"{where}={shown} is empty; give it a value ({origin})"
    if bound := _BOUNDS.get(item["type"]):
        bounds = {name: f"{limit:,}" if isinstance(limit, int) else f"{limit:g}" for name, limit in context.items()}
        return f"{where}={_written(values, where, value)!r} must be {bound.format(**bounds)} ({origin})"
    if item["type"] in ("list_type", "tuple_type"):
        return f"{where}={shown} is not a list; write '{where}=[{value}]' ({origin})"
    return f"{where}={shown} is not {' or '.join(_wanted(each) for each in items)}{_meant(where, items)} ({origin})"


def _written(values: Any, where: str, value: Any) -> Any:
    """The value as a user wrote it: "0k" or 1e99, which a bound sees as a whole number."""
    for part in where.split("."):
        if isinstance(values, list | tuple) and part.isdigit():
            values = values[int(part)]
        else:
            values = values.get(part) if isinstance(values, Mapping) else None
    return values if isinstance(values, str | float) else value


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


def _meant(where: str, items: list[Mapping[str, Any]]) -> str:
    """The nearest of the words that a choice allows."""
    words = [word for item in items if item["type"] == "literal_error" for word in _quoted(item["ctx"]["expected"])]
    value = str(items[0].get("input"))
    if instead := INSTEAD.get(f"{where.rpartition('.')[2]}={value}"):
        return f"; instead: {instead}"
    near = nearest(value, words)
    return f"; did you mean {where}={near}?" if near else ""


def _quoted(listed: str) -> list[str]:
    """The values in pydantic's "'a', 'b' or 'c'"."""
    return re.findall(r"'([^']+)'", listed)
