"""`launch/gpu_check.sh`: run the gates and benchmarks of a GPU, each in a process with a time limit, and tabulate them.

A part is a command and a function that reads its figures. Gates run side by side, since they share the GPU without
harm; benchmarks run one after another until the minutes are used up. A part that hangs is killed with all of its
processes, and the others still run.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from longctx.bench.gpu_parts import PARTS, Part, Row, missing
from longctx.storage.files import write_text
from longctx.versions import installed

MINUTES = 6.0
COLUMNS = ("part", "figure", "value", "floor", "peer", "holds")


def main(words: Sequence[str]) -> int:
    """Run the parts that `words` name (all, without a name) and write the table; returns the exit status."""
    names, settings = chosen(words)
    if names is None:
        print(usage())
        return 2
    out = Path(settings.get("out", "runs/gpu_check"))
    out.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + 60 * float(settings.get("minutes", MINUTES))
    rows = run_gates([part for part in PARTS if part.name in names and part.group == "tests"], out, deadline)
    for part in PARTS:
        if part.name in names and part.group != "tests":
            rows += run_part(part, out, deadline)
    here = machine()
    document = {**here, "rows": [row._asdict() for row in rows]}
    write_text(out / "table.json", json.dumps(document, indent=2) + "\n")
    table = as_text(here["device"], here["versions"], rows)
    write_text(out / "table.txt", table)
    print(f"\n{table}\n{out}/table.txt, {out}/table.json")
    return int(any(row.holds is False for row in rows))


def chosen(words: Sequence[str]) -> tuple[set[str] | None, dict[str, str]]:
    """The names of the parts that the words ask for, None for unknown words, and the settings key=value."""
    settings = dict(word.split("=", 1) for word in words if "=" in word)
    asked = [word for word in words if "=" not in word]
    groups = {group: {part.name for part in PARTS if part.group == group} for group in ("tests", "bench")}
    names = {part.name for part in PARTS}  # those of group `long` only run by name
    if set(settings) - {"out", "minutes"} or any(word not in groups and word not in names for word in asked):
        return None, settings
    found = set().union(*(groups.get(word, {word}) for word in asked)) if asked else groups["tests"] | groups["bench"]
    return found, settings


def usage() -> str:
    lines = ["usage: launch/gpu_check.sh [tests] [bench] [PART...] [out=FOLDER] [minutes=6]", ""]
    return "\n".join(lines + [f"  {part.name:12} {part.group:6} {part.help}" for part in PARTS])


def run_gates(parts: Sequence[Part], out: Path, deadline: float) -> list[Row]:
    """Run parts side by side; returns their rows, and how much memory they left on the GPU."""
    if not parts:
        return []
    before = memory_used()
    with ThreadPoolExecutor(len(parts)) as pool:
        rows = [row for found in pool.map(lambda part: run_part(part, out, deadline), parts) for row in found]
    if before is None or all(row.skipped for row in rows):
        return rows
    time.sleep(2.0)  # the driver frees what ended processes held
    left = (memory_used() or before) - before
    return [*rows, Row("gates", "left on the GPU afterwards", float(left), "MiB", "at most 64", holds=left <= 64)]


def memory_used() -> int | None:
    """MiB in use on the first device as nvidia-smi tells, or None without it."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "--id=0"]
    said = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace").stdout.strip()
    return int(said) if said.isdigit() else None


def run_part(part: Part, out: Path, deadline: float) -> list[Row]:
    """Run one part, print its rows and return them: figures, or why there are none."""
    rows = measured(part, out, deadline)
    print("\n".join(line(row) for row in rows), flush=True)
    return rows


def measured(part: Part, out: Path, deadline: float) -> list[Row]:
    if reason := missing(part):
        return [Row(part.name, part.help, skipped=reason)]
    left = deadline - time.monotonic()
    if left < part.least:
        return [Row(part.name, part.help, skipped=f"no time left ({left:.0f} s; it needs {part.least} s)")]
    folder = out / part.name
    if part.group != "long":  # a long part goes on with what it has; another's old files would pass for new ones
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(exist_ok=True)
    print(f"{part.name}: {part.help} ...", flush=True)
    began = time.monotonic()
    status, ended = run_limited(part.command(folder), folder / "output.txt", min(part.seconds, left))
    seconds = time.monotonic() - began
    try:
        rows = part.read(folder)
    except Exception as error:  # a part that died leaves half of its files, or none
        rows = [Row(part.name, part.help, holds=False, note=f"{ended}; no figures ({type(error).__name__}: {error})")]
    if status and all(row.holds is not False for row in rows):
        rows.append(Row(part.name, "ended well", holds=False, note=f"{ended}: {folder}/output.txt"))
    return [row._replace(seconds=round(seconds, 1)) for row in rows]


def run_limited(command: Sequence[str], output: Path, seconds: float) -> tuple[int, str]:
    """Run a command in a process group of its own and kill the group at the limit; returns its status, and in words."""
    with output.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True
        )
        try:
            status = process.wait(seconds)
            return status, f"status {status}"
        except subprocess.TimeoutExpired:
            return 124, f"killed after {seconds:.0f} s"
        finally:
            with suppress(ProcessLookupError, PermissionError):  # what the part started and left behind, too
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def machine() -> dict[str, Any]:
    """The device and the versions on which the figures were measured."""
    import torch
    from torch.cuda import nccl

    versions = {"torch": str(torch.__version__), "cuda": torch.version.cuda, "python": sys.version.split()[0]}
    if torch.cuda.is_available():
        versions["cudnn"] = str(torch.backends.cudnn.version())
        versions["nccl"] = ".".join(map(str, nccl.version()))
    for name in (
        "transformers",
        "deepspeed",
        "triton",
        "flash-attn",
        "flash-attn-4",
        "liger-kernel",
        "ring-flash-attn",
    ):
        versions[name] = installed(name) or "not installed"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA device"
    return {"device": device, "versions": versions}


def line(row: Row) -> str:
    if row.skipped:
        return f"  {row.part}: skipped, {row.skipped}"
    held = {True: "holds", False: "FAILS", None: ""}[row.holds]
    floor = f", floor {row.floor}" if row.floor else ""
    return f"  {row.part}: {row.figure} {row.shown()}{floor} {held} {row.note}".rstrip()


def as_text(device: str, versions: dict[str, Any], rows: Sequence[Row]) -> str:
    """The table as plain text; a skipped part is a row with its reason."""
    cells: list[tuple[str, ...]] = [COLUMNS]
    for row in rows:
        held = "skipped: " + row.skipped if row.skipped else {True: "yes", False: "NO", None: ""}[row.holds]
        cells.append((row.part, row.figure, row.shown(), row.floor, row.peer, " ".join([held, row.note]).strip()))
    widths = [max(len(line[i]) for line in cells) for i in range(len(COLUMNS) - 1)]
    body = ["  ".join([*(cell.ljust(w) for cell, w in zip(line, widths, strict=False)), line[-1]]) for line in cells]
    body.insert(1, "  ".join("-" * w for w in (*widths, 5)))
    head = f"{device}\n" + ", ".join(f"{name} {value}" for name, value in versions.items())
    return "\n".join([head, "", *(line.rstrip() for line in body)]) + "\n"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
