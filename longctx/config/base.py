"""The base of every schema: frozen dataclasses, numbers with units, and errors that name the remedy.

YAML and the command line give a plain dict; `build` turns it into the verb's dataclass or raises a UserError
(longctx.config.mistakes). Validation never changes a value other than reading its unit.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from numbers import Integral
from pathlib import PurePath
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as _pydantic_dataclass
from pydantic_core import PydanticKnownError
from typing_extensions import dataclass_transform

from longctx.config.mistakes import explain
from longctx.errors import UserError

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


def _below_runs(value: str) -> str:
    """runs/NAME stays below runs/; a name with folders in it (`group/run`) does."""
    path = PurePath(value)
    if path.is_absolute() or ".." in path.parts or not path.parts:
        raise ValueError(
            "is not a name below runs/; leave out .. and a leading /, or give the folder as run_dir=FOLDER"
        )
    return value


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
RunName = Annotated[Given, AfterValidator(_below_runs)]
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
        raise UserError(explain(error, kind, values, origin)) from None


@cache
def adapter_of(kind: type[T]) -> TypeAdapter[T]:
    """Build a schema's validator once per process."""
    return TypeAdapter(kind)
