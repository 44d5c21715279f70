"""Writes files and folders that appear only when complete, and syncs them before anything can refer to them.

`read_record` reads such a file back: a copy that was interrupted, or another program, may have cut it short.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from longctx.console import say
from longctx.errors import UserError, system_number
from longctx.signals import beside, temporary

GIB = 2.0**30  # bytes


def sync(path: Path) -> None:
    """fsync a file's bytes, or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a hidden path to write to; it is renamed to `path` if the block succeeds and removed if it fails.

    A reader sees the old file or the new one. A folder can replace only an empty folder.
    """
    with temporary(beside(path)) as partial, naming(path, partial):
        yield partial
        sync(partial)
        os.replace(partial, path)
        sync(path.parent)


@contextmanager
def naming(path: Path, partial: Path) -> Iterator[None]:
    """Raise a system's error while `path` is written under the name `partial` as an OSError that names `path`.

    An error of a full disk names no file at all.
    """
    try:
        yield
    except Exception as error:
        number = system_number(error)
        named = str((error.filename2 or error.filename) if isinstance(error, OSError) else "")
        full = number in (errno.ENOSPC, errno.EDQUOT)
        if number is None or not (full or named.startswith(str(partial))):
            raise
        raise OSError(number, os.strerror(number), str(path)) from error


@contextmanager
def only_writer(lock: Path, waiting: str) -> Iterator[bool]:
    """Hold the lock file `lock`, and wait while another process holds it, which the line `waiting` says.

    Yields whether the lock is held; some file systems have none.
    """
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(waiting)
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            yield False
            return
        yield True


def discard(path: Path) -> None:
    """Remove a file or folder in one step: a reader sees all of it or nothing."""
    with temporary(beside(path.with_name(f"{path.stem}-old{path.suffix}"))) as old:
        os.replace(path, old)


def nearest_existing(path: Path) -> Path:
    """The path itself if it exists, otherwise the nearest folder above it that does."""
    whole = path.absolute()
    return next(above for above in (whole, *whole.parents) if above.exists())


def size_words(size: float) -> str:
    """A number of bytes in words, in GiB, or in MiB where GiB would begin with zeros."""
    return f"{size / 2**30:,.2f} GiB" if size >= 0.1 * 2**30 else f"{size / 2**20:,.2f} MiB"


# The formats that save_figure writes, by the name's suffix; known here so that matplotlib need not be imported.
PICTURES = ("", ".png", ".svg", ".pdf", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".eps", ".ps")


def check_writable(path: Path, what: str, *, folder: bool) -> None:
    """Raise UserError unless this user can make or replace `path`, a folder or a file.

    A folder is made and removed for it, since permissions do not tell all: root may write everywhere, but not below
    /proc, on a read-only disk or under a name of 300 letters. what: the config key that names the path.
    """
    try:
        above = nearest_existing(path)
        if not above.is_dir() and (folder or above != path.absolute()):
            raise UserError(f"{what}={path} cannot be made: {above} is a file; choose another {what}=")
        if not folder and path.is_dir():
            raise UserError(f"{what}={path} is a folder, and a file is written; name a file in it, {what}={path}/NAME")
        place = above if above.is_dir() else above.parent
        if not os.access(place, os.W_OK | os.X_OK):
            raise UserError(
                f"{what}={path} cannot be written: this user may not write to {place}; choose another {what}="
            )
        _try_names(place, path)
    except OSError as error:
        # A file system such as /proc answers that the new folder does not exist.
        why = error.strerror if error.errno != errno.ENOENT else "new files cannot be made there"
        raise UserError(f"{what}={path} cannot be made: {why}; choose another {what}=") from None


def _try_names(place: Path, path: Path) -> None:
    """Make and remove a folder in `place`, and check the length of the names below it; raises an OSError."""
    longest = os.pathconf(place, "PC_NAME_MAX")
    for name in path.absolute().relative_to(place).parts:
        if len(os.fsencode(beside(Path(name)).name)) > longest:
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
    trial = beside(place / "longctx")
    trial.mkdir(exist_ok=True)  # another thread of this process may be trying as well
    with suppress(FileNotFoundError):
        trial.rmdir()


def check_picture(path: Path, what: str) -> None:
    """Raise UserError where the name of a picture ends with a suffix that is no format of pictures."""
    if path.suffix.lower() not in PICTURES:
        raise UserError(f"{what}={path} ends with no format of pictures; known: {', '.join(PICTURES[1:])}")


def write_text(path: Path, text: str) -> None:
    """Write a small text file through `replacing`."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, document: Any) -> None:
    """Write a small JSON file through `replacing`."""
    write_text(path, json.dumps(document, indent=2) + "\n")


def read_record(path: Path, what: str, remedy: str, *, keys: Collection[str] = ()) -> dict[str, Any]:
    """The content of a JSON or YAML file that longctx has written; the file's suffix tells which.

    what: the file in a few words. remedy: what the user can do when the file is damaged. keys: what it must have at
    least; YAML that is cut short may still be YAML. Raises UserError where the file is missing or damaged.
    """
    import yaml

    found, why = None, "is damaged or cut short"
    try:
        text = path.read_text(encoding="utf-8")
        why = why if text.strip() else "is empty"
        found = yaml.safe_load(text) if path.suffix == ".yaml" else json.loads(text or "null")
    except FileNotFoundError:
        why = "is missing"
    except (ValueError, yaml.YAMLError):  # the first is of JSON, or of bytes that are no text
        pass
    if isinstance(found, dict):
        absent = [key for key in keys if key not in found]
        if not absent:
            return found
        why = f"is cut short (it lacks {', '.join(absent)})"
    raise UserError(f"{path}, {what}, {why}; {remedy}")


def save_figure(figure: Any, path: Path, *, dpi: int) -> None:
    """Save a matplotlib figure in the format of the name's suffix, or as PNG without one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        figure.savefig(partial, dpi=dpi, format=path.suffix.removeprefix(".") or "png")
