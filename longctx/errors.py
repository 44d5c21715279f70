"""The one exception a user's mistake raises, and the search for the name they probably meant.

A message is one paragraph: where the value stands, the value, the rule it breaks, what to do, and in which
file. The command line prints it without a traceback and exits with status 2.
"""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake in what the user asked for; the text is the whole explanation."""


class RunFailed(RuntimeError):
    """Something went wrong that no setting of the user's explains; exit status 1."""


class OutOfMemory(RunFailed):
    """A device or the machine has no memory left; the text is empty where another rank has said it already."""


# What torch, CUDA and the C++ library say besides MemoryError and torch.OutOfMemoryError.
_NO_MEMORY = (
    "can't allocate memory", "not enough memory: you tried", "CUDA error: out of memory", "CUDA out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED", "std::bad_alloc",
)  # fmt: skip


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that an allocation failed, on a GPU or on the host."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _NO_MEMORY)


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name most like `name`, or None when nothing is close."""
    names = list(known)
    match = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    if match:
        return match[0]
    inside = [candidate for candidate in names if name and (name in candidate or candidate in name)]
    return min(inside, key=len) if inside else None
