"""The keys of synthetic tasks: a million six-digit numbers, of which a tenth are reserved for evaluation.

A key's side depends on the key alone: the first 8 bytes of its SHA-256, as a big-endian number modulo 10, are 0 for
evaluation. So training and evaluation never share a key, whatever the seed, the task or the wording.
"""

from __future__ import annotations

import hashlib
from typing import Literal

import numpy as np

from longctx.errors import UserError

KeySide = Literal["train", "eval"]

DIGITS = 6
SPACE = 10**DIGITS
_BUCKETS = 10


def split_of(key: str) -> KeySide:
    """Return the side of a key: "eval" for a tenth of all keys, "train" for the others."""
    bucket = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") % _BUCKETS
    return "eval" if bucket == 0 else "train"


def draw_keys(rng: np.random.Generator, count: int, split: KeySide, taken: set[str] | None = None) -> list[str]:
    """Draw `count` different keys of one side that are not in `taken`, and add them to `taken`.

    Raises UserError when the side does not hold so many.
    """
    used = set() if taken is None else taken
    available = SPACE * (1 if split == "eval" else 9) // _BUCKETS
    if count + len(used) > available * 0.9:
        raise UserError(
            f"a task with {count:,} keys: of {DIGITS} digits there are {available * 9 // 10:,} that the {split} side "
            "may draw; lower its count or its links"
        )
    found: list[str] = []
    while len(found) < count:
        block = 12 if split == "eval" else 2
        for number in rng.integers(0, SPACE, size=block * (count - len(found))).tolist():
            key = f"{number:0{DIGITS}d}"
            if key not in used and split_of(key) == split:
                used.add(key)
                found.append(key)
                if len(found) == count:
                    break
    return found


def draw_values(rng: np.random.Generator, count: int, taken: set[str]) -> list[str]:
    """Draw `count` different six-digit numbers that are not in `taken`, and add them to `taken`."""
    found: list[str] = []
    while len(found) < count:
        for number in rng.integers(0, SPACE, size=count - len(found)).tolist():
            value = f"{number:0{DIGITS}d}"
            if value not in taken:
                taken.add(value)
                found.append(value)
    return found
