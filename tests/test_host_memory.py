"""The memory that control groups leave to a process, in folders like the kernel's."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from longctx import host_memory
from longctx.host_memory import free_memory

MIB = 2**20


def group(folder: Path, limit: str, used: int, caches: int, *, version: int = 2) -> None:
    names = (
        ("max", "current", "inactive_file")
        if version == 2
        else ("limit_in_bytes", "usage_in_bytes", "total_inactive_file")
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"memory.{names[0]}").write_text(f"{limit}\n")
    (folder / f"memory.{names[1]}").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon {used - caches}\n{names[2]} {caches}\n")


def own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, lines: str) -> None:
    (tmp_path / "own").write_text(lines)
    monkeypatch.setattr(host_memory, "_OWN", tmp_path / "own")
    monkeypatch.setattr(host_memory, "_ROOT", tmp_path)


def test_a_jobs_limit_holds_for_its_tasks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As under Slurm: the job's group has the limit, and the task's below it has none."""
    own(monkeypatch, tmp_path, "0::/slurm/job_7/task_0\n")
    group(tmp_path / "slurm/job_7", str(4 * MIB), 3 * MIB, 0)
    group(tmp_path / "slurm/job_7/task_0", "max", 3 * MIB, 0)
    assert host_memory.host_memory() == 4 * MIB
    assert free_memory() == MIB


@pytest.mark.parametrize("version", [1, 2])
def test_caches_of_files_count_as_free(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, version: int) -> None:
    """As in a container that has read a model: its caches fill the group, and give way to whoever wants the memory."""
    own(monkeypatch, tmp_path, "0::/\n" if version == 2 else "12:pids:/x\n5:cpu,memory:/docker/1f\n")
    group(tmp_path if version == 2 else tmp_path / "memory", str(8 * MIB), 8 * MIB, 5 * MIB, version=version)
    assert host_memory.host_memory() == 8 * MIB
    assert free_memory() == 5 * MIB


@pytest.mark.parametrize("lines", ["", "0::/somewhere\n", "3:cpuset:/\n"])
def test_without_a_limit_it_is_the_machines(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, lines: str) -> None:
    own(monkeypatch, tmp_path, lines)
    assert 64 * MIB < free_memory() < host_memory.host_memory()


def test_a_limit_holds_where_nothing_is_told_of_caches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    own(monkeypatch, tmp_path, "0::/\n")
    group(tmp_path, str(8 * MIB), 5 * MIB, 2 * MIB)
    (tmp_path / "memory.stat").unlink()
    assert host_memory.host_memory() == 8 * MIB
    assert free_memory() == 3 * MIB


def test_the_peak_is_the_program_s_own() -> None:
    """Over exec Linux keeps the largest resident set of a process, and a started one begins as its starter's copy."""
    child = "import resource; from longctx.host_memory import peak_resident as peak; print(int(peak()), " \
            "resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)"  # fmt: skip
    parent = f"import subprocess, sys; held = bytearray({400 * MIB}); subprocess.run([sys.executable, '-c', {child!r}])"
    done = subprocess.run([sys.executable, "-c", parent], capture_output=True, text=True, check=True)
    own, inherited = map(int, done.stdout.split())
    assert 5 * MIB < own < 200 * MIB
    if sys.platform == "linux":
        assert inherited > 400 * MIB
