"""Starts `longctx` and `python -m longctx`; ctrl-C ends them without a traceback while modules are imported."""

from __future__ import annotations

import os
import signal


def main() -> int:
    """Import the command line and run it; returns the exit status."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # and not ignored, as behind a script's `&`
        signal.signal(signal.SIGINT, _leave)
    from longctx.utf8 import use_utf8

    use_utf8()
    from longctx import cli

    if signal.getsignal(signal.SIGINT) is _leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    return cli.main()


def _leave(*_: object) -> None:
    os.write(2, b"longctx: interrupted\n")
    os._exit(130)


if __name__ == "__main__":
    raise SystemExit(main())
