"""The one exception a user's mistake raises, and the search for the name they probably meant.

A message is one paragraph: where the value stands, the value, the rule it breaks, what to do, and in which
file. The command line prints it without a traceback and exits with status 2.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake in what the user asked for; the text is the whole explanation."""


class RunFailed(RuntimeError):
    """Something went wrong that no setting of the user's explains; exit status 1."""


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name most like `name`, or None when nothing is close."""
    names = list(known)
    match = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    if match:
        return match[0]
    inside = [candidate for candidate in names if name and (name in candidate or candidate in name)]
    return min(inside, key=len) if inside else None
