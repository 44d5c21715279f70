"""Ends a process on a signal: it removes half-written files, kills child processes, writes one line, sets a status.

Ctrl-C ends every verb at once with 130. SIGTERM, SIGUSR1 (Slurm's usual grace signal) and SIGHUP (a closed terminal)
ask a training run to save and to leave with 75, to be requeued: at once where everything is saved, and through
`StopRequest` where steps are unsaved. Other verbs end on SIGTERM as on ctrl-C, with status 143.

The handler raises nothing: an exception at any instant of an import, a destructor or a library's callback is swallowed
or ends in pages of tracebacks. It kills the processes started from here, removes the registered temporary files,
writes the line and exits. Python runs a handler in the main thread only, after the call it is in (a collective, a
kernel); where that takes longer than PATIENCE, a thread woken by the signal does the same.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import NoReturn

from longctx.processes import alive, kill_descendants, started

SAVED_AND_REQUEUE = 75
INTERRUPTED = 130
REQUEUES = 8  # the default of launch.requeues, which holds while the config is unknown
PATIENCE = 1.0  # seconds that the main thread has to run the handler itself
_PARTIAL = re.compile(r"\.(.+)\.partial-(\d+)")

_lock = threading.RLock()  # taken for good by the thread that ends the process: nothing is registered after that
_leaver: int | None = None
_temporary: set[Path] = set()
_swept: list[Path] = []
_speaks = True
_where: Callable[[], str] | None = None
_requeues = REQUEUES
_stop: StopRequest | None = None


class StopRequest:
    """Whether a signal asked this run to stop.

    name: the signal, or None. In a process that `catch` owns, a signal ends the process at once unless steps are
    unsaved. Elsewhere (training called from a program) it is noted, and the run stops at its next step or stage.
    """

    def __init__(self, *, own: bool = False) -> None:
        self.name: str | None = None
        self.number: int | None = None
        self._own, self._unsaved, self._words = own, False, "nothing was trained"
        self._heard = False  # whether no line is to say that the signal has come
        self._before = {} if own else {number: signal.signal(number, self.note) for number in asking()}

    @property
    def asked(self) -> bool:
        return self.name is not None

    def unsaved(self, *, confirms: bool = True) -> None:
        """From here on a signal is only noted, and the caller checks `asked`.

        confirms: a line says so where the work at hand takes longer than PATIENCE.
        """
        self._unsaved, self._heard = True, not confirms

    def saved(self, words: str) -> None:
        """From here on a signal ends an owned process at once. words: what is saved, for its last line."""
        self._words, self._unsaved = words, False
        self._leave_if_asked()

    def note(self, number: int, frame: FrameType | None = None) -> None:
        """Note a signal; the signal handler."""
        if number == signal.SIGHUP:
            go_silent()
        if self.name is None:
            self.name, self.number = signal.Signals(number).name, number
        elif self._own and self._unsaved and not self._heard:  # PATIENCE has passed, so the work at hand takes long
            self._heard = True
            _say(f"{self.name}: the run saves after the work at hand")
        self._leave_if_asked()

    def _leave_if_asked(self) -> None:
        if self._own and self.asked and not self._unsaved:
            leave(SAVED_AND_REQUEUE, f"{self.name}: {self._words}; {continuing()}")

    def answered(self) -> None:
        """Forget the signal, which has been answered: the run goes on."""
        self.name, self.number = None, None

    def close(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}


def stop_request() -> StopRequest:
    """The stop request of this process if `catch` made one, else a new one that only notes. The caller closes it."""
    return _stop or StopRequest()


def all_saved(words: str) -> None:
    """Call StopRequest.saved on the stop request of this process, if `catch` made one."""
    if _stop is not None:
        _stop.saved(words)


def catch(*, requeue: bool = False, speaks: bool = True) -> None:
    """Install the signal handlers of a command; the first call of its main function.

    requeue: the command trains (see the module). speaks: it writes the last line, as only rank 0 does.
    """
    global _speaks, _stop
    _speaks = speaks
    if requeue:
        _stop = StopRequest(own=True)
    wanted = asking() if requeue else [signal.SIGTERM]
    numbers = [number for number in (signal.SIGINT, *wanted) if signal.getsignal(number) != signal.SIG_IGN]
    for number in numbers:
        signal.signal(number, _handle)
    _watch(numbers)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)  # a launcher may hold them back until this process is ready


def done() -> None:
    """Ignore signals while the interpreter shuts down, when the work is done."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


def interrupted_words(where: Callable[[], str]) -> None:
    """Continue the last line after ctrl-C with the text of where(): what of the run is saved."""
    global _where
    _where = where


def saved_so_far() -> str:
    """The part of the run that is saved, in words."""
    return _where() if _where else "nothing was trained"


def asking() -> list[signal.Signals]:
    """The signals that ask a run to stop. Under nohup, which ignores SIGHUP, it is not among them."""
    ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return [signal.SIGTERM, signal.SIGUSR1] + ([] if ignored else [signal.SIGHUP])


def _handle(number: int, frame: FrameType | None = None) -> None:
    if _leaver == threading.get_ident():  # this thread is ending the process already
        return
    if number == signal.SIGINT:
        leave(INTERRUPTED, f"interrupted; {_where()}" if _where else "interrupted")
    if _stop is not None:
        _stop.note(number)
    else:
        leave(128 + number, f"ended by {signal.Signals(number).name}")


def _watch(numbers: list[signal.Signals]) -> None:
    """Start a thread that handles a signal PATIENCE seconds after it came, if the main thread has not."""
    read, write = os.pipe()
    os.set_blocking(write, False)
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)

    def watch() -> None:
        while came := os.read(read, 1):
            if came[0] in numbers:
                time.sleep(PATIENCE)
                _handle(came[0])

    threading.Thread(target=watch, name="signals", daemon=True).start()


def leave(status: int, words: str) -> NoReturn:
    """End this process and its descendants, remove temporary files, and write one line to standard error."""
    global _leaver
    _lock.acquire()  # a second thread that comes here waits for the end
    _leaver = threading.get_ident()
    try:
        if status == SAVED_AND_REQUEUE:
            note_status(status)
        _remove_temporaries(kill_descendants())
        _say(words)
    finally:
        os._exit(status)


def _say(words: str) -> None:
    if not _speaks:
        return
    show_cursor = "\x1b[?25h\n" if os.isatty(2) else ""  # a progress bar hides it, and its line is not ended
    with suppress(OSError):
        os.write(2, f"{show_cursor}longctx: {words}\n".encode())  # the signal may have interrupted a print


def limit_requeues(count: int) -> None:
    """Let a scheduler requeue the run `count` times at most (launch.requeues)."""
    global _requeues
    _requeues = count


def continuing() -> str:
    """How a run that leaves with 75 goes on, in words."""
    text = "the same command continues the run"
    return text if _may_requeue() else f"{text}, which is not requeued again (launch.requeues={_requeues})"


def _may_requeue() -> bool:
    return int(os.environ.get("SLURM_RESTART_COUNT", "0")) < _requeues


def note_status(status: int) -> bool:
    """Write the run's status to the file of the launch script, and return whether that succeeded.

    srun gives the highest status of all ranks and ends those that are left. With the file the ranks leave with 0, and
    the script ends with the run's own status. "requeue" behind it lets the script requeue the job.
    """
    path = os.environ.get("LONGCTX_STATUS")
    if not path or not _speaks:
        return False
    again = " requeue" if status == SAVED_AND_REQUEUE and _may_requeue() else ""
    try:
        Path(path).write_text(f"{status}{again}\n", encoding="utf-8")
    except OSError as error:
        _say(f"warning: LONGCTX_STATUS={path} cannot be written ({error.strerror}), so the job's status is srun's")
        return False
    return True


def go_silent() -> None:
    """Redirect standard output and error to /dev/null: their terminal is gone."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(nowhere, stream)


def beside(path: Path) -> Path:
    """The hidden name under which this process writes a file or folder before it becomes `path`: .NAME.partial-PID."""
    return path.with_name(f".{path.stem}.partial-{os.getpid()}{path.suffix}")


@contextmanager
def temporary(path: Path) -> Iterator[Path]:
    """A file or folder that is removed at the end of the block, or when a signal (not SIGKILL) ends the process."""
    with _lock:
        _temporary.add(path)
    try:
        yield path
    finally:
        remove(path)
        _temporary.discard(path)


@contextmanager
def swept(folder: Path) -> Iterator[None]:
    """Remove what child processes left half-written in `folder`, if a signal ends this process inside the block."""
    with _lock:
        _swept.append(folder)
    try:
        yield
    finally:
        _swept.remove(folder)


def sweep(
    folder: Path, *, owners: Collection[int] | None = None, names: Collection[str] | None = None, living: bool = True
) -> None:
    """Remove half-written files under `folder` (see `beside`), of these owners (pids) and names only, if given.

    living: also those that a process of this machine may still be writing.
    """
    for path in folder.rglob(".*.partial-*"):
        if (found := _PARTIAL.match(path.name)) is None or (names is not None and found[1] not in names):
            continue
        owner = int(found[2])
        if (owners is None or owner in owners) and (living or not _may_write(owner, path)):
            remove(path)


def _may_write(pid: int, path: Path) -> bool:
    """Whether a living process may be writing `path`: one that began before, since numbers of processes come again."""
    with suppress(OSError):
        return alive(pid) and started(pid) < path.stat().st_mtime + 2
    return False


def remove(path: Path) -> None:
    """Remove a file or a folder, also one into which another thread or rank still writes."""
    for _ in range(200):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with suppress(OSError):
                path.unlink(missing_ok=True)
        if not path.exists():
            return
        time.sleep(0.01)


def _remove_temporaries(ended: list[int]) -> None:
    for path in list(_temporary):
        remove(path)
    for folder in list(_swept):
        sweep(folder, owners=ended)
