"""Python commands as processes of their own that import nothing anew: `python -m longctx train ...` in a tenth of
the processor time.

They are forked from the server of tests/dist/ranks.py, which has imported torch, transformers and longctx. What they
start themselves with this interpreter (ranks, workers, the runs of a sweep) is forked from them, as their own child:
signals, sessions, pipes and death reach it as they reach a started interpreter. Tests of importing itself, of what a
terminal sees first, and of the environment that a library reads while it is imported start an interpreter instead.
"""

from __future__ import annotations

import atexit
import importlib
import inspect
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

SETTINGS = list(inspect.signature(subprocess.Popen._execute_child).parameters)[2:]  # type: ignore[attr-defined]
PIPES = [name for name in SETTINGS if name in ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")]
STATEFUL = ("longctx.console", "longctx.signals")  # what these hold of the forking process is forgotten


def python(
    *words: str, timeout: float = 280, cwd: Path | None = None, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run `python WORDS`: WORDS begin with -m MODULE, -c CODE or a script. env: added to this environment."""
    from tests.dist.ranks import forked

    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "said"
        process = forked(command, list(words), str(cwd or os.getcwd()), {**os.environ, **(env or {})}, log=log)
        process.join(timeout)
        if process.is_alive():
            os.killpg(process.pid, signal.SIGKILL)
            raise subprocess.TimeoutExpired(list(words), timeout)
        out, err = (log.with_suffix(end).read_text() for end in (".out", ".err"))
    return subprocess.CompletedProcess(list(words), process.exitcode, out, err)


def command(words: Sequence[str], cwd: str, environment: Mapping[str, str]) -> int:
    """What the interpreter does with these words, in a process that was just forked. Returns the exit status."""
    subprocess.Popen = ForkedPopen  # type: ignore[misc]
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    import torch

    torch.set_num_threads(int(environment.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
    for name in STATEFUL:
        if name in sys.modules:
            importlib.reload(sys.modules[name])
    try:
        _run(list(words))
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _run(words: list[str]) -> None:
    if words[0] == "-m":
        sys.argv = words[1:]
        if not hasattr(sys.modules.get(words[1]), "__path__"):  # runpy warns of a module that is loaded twice
            sys.modules.pop(words[1], None)
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    elif words[0] == "-c":
        sys.argv = ["-c", *words[2:]]
        exec(compile(words[1], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")


class ForkedPopen(subprocess.Popen):
    """subprocess.Popen that forks this process where the command is this interpreter's."""

    def _execute_child(self, args: Any, *settings: Any) -> None:
        words = [args] if isinstance(args, str) else [os.fsdecode(word) for word in args]
        if words[1:2] == ["-u"]:
            words.pop(1)
        if words[0] != sys.executable or words[1] not in ("-m", "-c"):
            return super()._execute_child(args, *settings)  # type: ignore[misc]
        given = dict(zip(SETTINGS, settings, strict=True))
        theirs = [given[name] for name in ("p2cread", "c2pwrite", "errwrite")]
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        self.pid = os.fork()
        if self.pid == 0:
            status = 1
            try:
                _become_new(theirs, given["pass_fds"], session=given["start_new_session"])
                if given["preexec_fn"] is not None:
                    given["preexec_fn"]()
                where = os.getcwd() if given["cwd"] is None else os.fsdecode(given["cwd"])
                status = command(words[1:], where, dict(os.environ if given["env"] is None else given["env"]))
                threading._shutdown()  # type: ignore[attr-defined]
                atexit._run_exitfuncs()
                for stream in (sys.stdout, sys.stderr):
                    stream.flush()
            finally:
                os._exit(status)
        self._child_created = True
        self._close_pipe_fds(*(given[name] for name in PIPES))  # type: ignore[attr-defined]
        return None


def _become_new(streams: Sequence[int], passed: Sequence[int], *, session: bool) -> None:
    """Drop handlers, exit functions, files and the session of this process: a started interpreter has none of these."""
    signal.set_wakeup_fd(-1)
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    atexit._clear()
    for fd, stream in enumerate(streams):
        if stream != -1:
            os.dup2(stream, fd)
    for fd in map(int, os.listdir("/proc/self/fd")):
        if fd > 2 and fd not in passed:
            with suppress(OSError):  # the listing's own
                os.close(fd)
    for fd in passed:
        os.set_inheritable(fd, True)
    resource_tracker._resource_tracker._fd = None  # type: ignore[attr-defined]
    if session:
        os.setsid()
