"""Fixtures that several folders of tests share: the quickstart, run once as a user would start it."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
from dataclasses import dataclass
from pathlib import Path

import hypothesis
import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when huggingface_hub is imported, here and by the server
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # a process forked from one whose OpenMP has threads may hang in its own

from tests.started import SHORT, longctx

# Everybody gets the same examples, so that a test fails by the change at hand. Others: --hypothesis-profile=search
hypothesis.settings.register_profile("same", deadline=None, derandomize=True)
hypothesis.settings.register_profile("search", deadline=None)
hypothesis.settings.load_profile("same")


@dataclass(frozen=True)
class Quickstart:
    """A finished quickstart: its folder, and the overrides it was started with."""

    folder: Path
    overrides: list[str]


@pytest.fixture(scope="session")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> Quickstart:
    """The quickstart that LONGCTX_QUICKSTART names, copied; otherwise one with shortened stages, run by one worker."""
    if made := os.environ.get("LONGCTX_QUICKSTART"):
        folder = tmp_path_factory.mktemp("quickstart") / "run"
        shutil.copytree(made, folder)
        return Quickstart(folder, [])
    shared = (
        tmp_path_factory.getbasetemp().parent if "PYTEST_XDIST_WORKER" in os.environ else tmp_path_factory.getbasetemp()
    )
    folder = shared / "quickstart"
    with open(shared / "quickstart.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "summary.json").exists():
            done = longctx("train", "experiment=quickstart", f"run_dir={folder}", *SHORT)
            assert done.returncode == 0, done.stderr[-4000:]
    return Quickstart(folder, SHORT)


def pytest_configure() -> None:
    """Let signals end processes as in a terminal: a shell starts a background command with ctrl-C ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that start processes come first, so that no worker is left with a long one at the end."""
    first = (
        "tests/launch/",
        "tests/train/",
        "tests/test_interrupts.py",
        "tests/test_readme.py",
        "tests/test_library.py",
    )
    items.sort(key=lambda item: not item.nodeid.startswith(first))
