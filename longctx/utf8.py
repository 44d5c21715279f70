"""UTF-8 for names and text, whatever the locale.

A bare container or an old cluster's batch environment has the locale C, and may switch Python's UTF-8 mode off. Python
then takes paths and text for ASCII, and would end at the first other character.
"""

from __future__ import annotations

import io
import os
import sys


def use_utf8() -> None:
    """Start this process anew in UTF-8 mode where names would be ASCII, and let the screen replace what it cannot show.

    It is the first act of a process that a user or a launcher starts; the processes that it starts inherit the mode.
    """
    if sys.getfilesystemencoding() == "ascii" and not sys.flags.utf8_mode:  # it cannot be changed in a running process
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="backslashreplace")
