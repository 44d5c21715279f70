"""Exceptions with messages for users, and the search for the name that a user probably meant.

A message is one paragraph with the key, its value, the rule that the value breaks, what to do, and the file. The
command line prints it without a traceback and exits with status 2.
"""

from __future__ import annotations

import difflib
import errno
import os
import re
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake in the user's input; the text explains it completely."""


class RunFailed(RuntimeError):
    """A failure that is not a mistake in the user's input; the exit status is 1."""


class OutOfMemory(RunFailed):
    """A device or the machine has no memory left; the text is empty when another rank has reported it."""


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or the name of its type where it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def named(error: BaseException) -> str:
    """An error's type and the first line of its text, such as `OSError: no such file`; the type alone for no text."""
    line = first_line(error)
    return line if line == type(error).__name__ else f"{type(error).__name__}: {line}"


# Messages of torch, CUDA and the C++ library that come without MemoryError or torch.OutOfMemoryError.
_NO_MEMORY = (
    "can't allocate memory", "not enough memory: you tried", "CUDA error: out of memory", "CUDA out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED", "std::bad_alloc",
)  # fmt: skip


def out_of_memory(error: BaseException) -> bool:
    """Tell whether an exception reports a failed allocation, on a GPU or on the host."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _NO_MEMORY)


_BY_SYSTEM = {
    errno.EROFS: "name a path on another disk",
    errno.EACCES: "mend its permissions, or name another path",
    errno.EPERM: "mend its permissions, or name another path",
    errno.ENOSPC: "free some space, or name a folder on another disk",
    errno.EDQUOT: "free some of your quota, or name a folder on another disk",
    errno.ENOTDIR: "a part of its path is a file; name another path",
    errno.EISDIR: "name a file, not a folder",
    errno.ENAMETOOLONG: "give a shorter name",
    errno.ELOOP: "a link in its path points to itself; name another path",
    errno.EFBIG: "its file system takes no file of this size; name a folder on another disk",
    errno.EIO: "its disk fails; name a folder on another disk",
    errno.ESTALE: "its network file system has lost it; mount it again, or name a folder on another disk",
    errno.EMFILE: "this process may open no more files; raise the limit with `ulimit -n`",
    errno.ENFILE: "this machine can open no more files; end other programs",
}


def system_number(error: BaseException) -> int | None:
    """The system's number of an error (errno), if it has one.

    Libraries in Rust, such as safetensors, have errors of their own, which name the number in their text.
    """
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"\(os error (\d+)\)|Os \{ code: (\d+)", str(error))
    return int(found[1] or found[2]) if found else None


def refused_by_system(error: Exception) -> str | None:
    """Say in a sentence which file the system refuses to read or write, why, and what to do; None for other errors."""
    number = system_number(error)
    if number not in _BY_SYSTEM:
        return None
    path = (error.filename2 or error.filename) if isinstance(error, OSError) else None
    return f"{path or 'a file'} cannot be read or written: {os.strerror(number)}; {_BY_SYSTEM[number]}"


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Return the known name that is most similar to `name`, or None when no name is similar."""
    names = list(known)
    match = difflib.get_close_matches(name, names, n=1, cutoff=0.51)  # nonsense and seed reach one half
    if match:
        return match[0]
    inside = [candidate for candidate in names if name and (name in candidate or candidate in name)]
    return min(inside, key=len) if inside else None
