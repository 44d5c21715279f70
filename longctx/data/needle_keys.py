"""The keys of synthetic tasks: a million six-digit numbers, a tenth of them kept for evaluation.

Which side a key is on follows from the key alone (the first 8 bytes of its SHA-256, as a big-endian number,
modulo 10: 0 is evaluation), so training and evaluation cannot share one whatever the seed, the task or the
phrasing.
"""

from __future__ import annotations

import hashlib
from typing import Literal

import numpy as np

KeySide = Literal["train", "eval"]

DIGITS = 6
SPACE = 10**DIGITS
_BUCKETS = 10


def split_of(key: str) -> KeySide:
    """The side a key is on: "eval" for one tenth of all keys, "train" for the others."""
    bucket = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") % _BUCKETS
    return "eval" if bucket == 0 else "train"


def draw_keys(rng: np.random.Generator, count: int, split: KeySide, taken: set[str] | None = None) -> list[str]:
    """`count` different keys of one side, none of them in `taken`, to which they are added."""
    used = set() if taken is None else taken
    room = SPACE * (1 if split == "eval" else 9) // _BUCKETS
    if count + len(used) > room * 0.9:
        raise ValueError(f"{count} different keys of {DIGITS} digits are more than the {split} side holds")
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
    """`count` different numbers of six digits that are not in `taken`, to which they are added."""
    found: list[str] = []
    while len(found) < count:
        for number in rng.integers(0, SPACE, size=count - len(found)).tolist():
            value = f"{number:0{DIGITS}d}"
            if value not in taken:
                taken.add(value)
                found.append(value)
    return found
