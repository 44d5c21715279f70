"""`-m key=a,b other=1,2`: runs every combination of the values, each in a process and a folder of its own.

Every combination is composed and validated before the first one starts. A run that fails does not stop the others; one
that was interrupted, or saved and asks to be requeued, does. Starting the same sweep again continues it.
"""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from longctx.config.compose import load, schema_of
from longctx.config.words import CommandLine, Overrides
from longctx.errors import UserError
from longctx.processes import die_with_parent
from longctx.signals import INTERRUPTED, SAVED_AND_REQUEUE, asking
from longctx.verbs import Verb

_MEANING = {0: "done", 1: "failed", 2: "refused"}
_MEANING |= {SAVED_AND_REQUEUE: "saved, to be requeued", INTERRUPTED: "interrupted"}

_WRITTEN = ("out", "png", "plots")  # keys that name a file or folder to write


def sweep(verb: Verb, line: CommandLine) -> int:
    """Run every combination; returns the worst status: interrupted, to be requeued, failed, refused, done."""
    known = Overrides(verb.root, schema_of(verb.root), line.folders)
    swept = list(known.expand(line.overrides))
    if not swept[0]:
        raise UserError("-m has nothing to sweep: give a key several values, such as curriculum.lr.peak=3e-4,6e-4")
    fixed = [word for word in line.overrides if known.parsed(word).get_key_element() not in swept[0]]
    runs: list[tuple[str, list[str], str]] = []
    config: Any = None
    for values, label in zip(swept, _labels(swept), strict=True):
        words = [*fixed, *(f"{key}={value}" for key, value in values.items())]
        config = load(verb, words, line.folders)
        if verb.name == "train":
            _check_stages(config, values)
        own, where = _own_place(config, label, {key.lstrip("+~") for key in values})
        runs.append((" ".join(f"{key}={value}" for key, value in values.items()), [*words, *own], where))
    places = [where for _, _, where in runs if where]
    if len(set(places)) < len(places):
        raise UserError(
            f"two runs of the sweep would share {max(places, key=places.count)}; give them different values"
        )
    if line.cfg:
        raise UserError("--cfg prints one config; leave -m and the other values out")
    return _run(verb, line, runs, as_json=getattr(config, "format", "text") == "json")


def _check_stages(config: Any, values: dict[str, str]) -> None:
    """Raise UserError, which names the combination, for a curriculum that cannot be resolved for its model."""
    from longctx.train.train import resolve_stages

    try:
        resolve_stages(config)
    except UserError as error:
        raise UserError(f"{' '.join(f'{key}={value}' for key, value in values.items())}: {error}") from None


def _labels(swept: Sequence[dict[str, str]]) -> list[str]:
    """A name for each combination; paths have as many of their last parts in it as tell all of them apart."""
    most = max(len(Path(value).parts) for values in swept for value in values.values())
    for count in range(1, most + 1):
        labels = [_label(values, count) for values in swept]
        if len(set(labels)) == len(labels):
            return labels
    return [_label(values, 1) for values in swept]


def _label(values: dict[str, str], count: int) -> str:
    """A name made of the values: peak-1e-5_cp-2. A key is shortened to its last part where that is unambiguous.

    count: how many of its last parts are left of a value that is a path.
    """
    lasts = [key.rpartition(".")[2] for key in values]
    parts = []
    for key, value in values.items():
        last = key.rpartition(".")[2]
        shown = "/".join(Path(value).parts[-count:]) or value
        parts.append(f"{last if lasts.count(last) == 1 else key}-{shown}")
    return re.sub(r"[^\w.+-]+", "-", "_".join(parts).lstrip("+~")).strip("-")


def _own_place(config: Any, label: str, swept: set[str]) -> tuple[list[str], str]:
    """The overrides that give a run a folder (or file) of its own, and that place."""
    run_dir, name = getattr(config, "run_dir", None), getattr(config, "name", None)
    words, where = [], ""
    if "run_dir" not in swept and "name" not in swept and run_dir is not None:
        key, value = ("run_dir", f"{run_dir}/{label}") if run_dir else ("name", f"{name}/{label}")
        where = value if run_dir else f"runs/{value}"
        words.append(f"{key}={_quoted(value)}")
        if getattr(config, "cache", None) == "" and "cache" not in swept:  # one tokenization serves all
            words.append(f"cache={_quoted(f'{config.folder}/data')}")
    elif run_dir is not None:
        where = config.folder
    for key in _WRITTEN:
        if (given := getattr(config, key, None)) and key not in swept:
            file = Path(given)
            own = str(file.with_name(f"{file.stem}-{label}{file.suffix}") if file.suffix else file / label)
            words.append(f"{key}={_quoted(own)}")
            where = where or own
    return words, where


def _quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def _run(verb: Verb, line: CommandLine, runs: Sequence[tuple[str, list[str], str]], *, as_json: bool) -> int:
    from longctx import console

    rows: list[dict[str, Any]] = []
    folders = [word for folder in line.folders for word in ("--config-dir", str(folder))]
    for number, (values, words, where) in enumerate(runs, 1):
        console.say(f"[bold]{number}/{len(runs)}[/bold] {verb.name} {values}")
        command = [sys.executable, "-m", "longctx", *verb.name.split(), *folders, *words]
        begun = time.monotonic()
        status, text = _one(command, as_json)
        rows.append({"values": values, "status": status, "seconds": round(time.monotonic() - begun, 1), "where": where})
        rows[-1] |= {"loss": _last_loss(Path(where)) if verb.name == "train" else None} if where else {}
        if as_json:
            rows[-1]["result"] = json.loads(text) if status == 0 and text else None
        if status in (SAVED_AND_REQUEUE, INTERRUPTED):
            break
    if as_json:
        console.emit_json({"runs": rows})
    else:
        console.emit(_table(rows, [values for values, _, _ in runs[len(rows) :]]))
    for row in rows:
        if row["status"]:
            console.last_line(f"{row['values']}: {_meaning(row['status'])} (status {row['status']})")
    worst = [0, 2, 1, SAVED_AND_REQUEUE, INTERRUPTED]  # the last two ended the sweep
    return max((row["status"] if row["status"] in worst else 1 for row in rows), key=worst.index)


def _one(command: Sequence[str], capture: bool) -> tuple[int, str]:
    """One run to its end: (status, standard output where it is captured). Requests to stop are passed on to it."""
    out = subprocess.PIPE if capture else None
    with subprocess.Popen(
        command, stdout=out, encoding="utf-8", errors="replace", preexec_fn=die_with_parent
    ) as process:
        before = {number: signal.signal(number, lambda number, _: process.send_signal(number)) for number in asking()}
        text = ""
        try:
            while True:
                try:
                    text = process.communicate()[0] or ""
                    break
                except KeyboardInterrupt:  # the terminal sent it to the run as well, which has the last word
                    continue
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    return process.returncode, text


def _last_loss(run: Path) -> float | None:
    """The mean training loss of the last ten steps; None where none was taken."""
    try:
        steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError):
        return None
    losses = [step["loss"] for step in steps if isinstance(step.get("loss"), float)][-10:]
    return sum(losses) / len(losses) if losses else None


def _meaning(status: int) -> str:
    return _MEANING.get(status, f"ended by signal {-status}" if status < 0 else "failed")


def _table(rows: Sequence[dict[str, Any]], left: Sequence[str]) -> Any:
    """A line per run, with its last loss where any run has trained."""
    from rich.table import Table

    losses = [row.get("loss") for row in rows]
    trained = any(loss is not None for loss in losses)
    table = Table("values", "outcome", "seconds", *["last loss"] * trained, "result in", box=None, pad_edge=False)
    for row, loss in zip(rows, losses, strict=True):
        cells = [row["values"], _meaning(row["status"]), f"{row['seconds']:.1f}"]
        cells += ["" if loss is None else f"{loss:.4f}"] * trained
        table.add_row(*cells, row["where"] if Path(row["where"]).exists() else "")
    for values in left:
        table.add_row(values, "not started")
    return table
