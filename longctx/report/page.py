"""Write a run's report: one HTML page with results, pictures, loss curve and settings, without scripts.

All content comes from the run's folder: summary.json, metrics.jsonl, finished.json of each stage, and config.yaml.
"""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Iterable, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from longctx import console
from longctx.config.report import ReportConfig
from longctx.errors import UserError
from longctx.eval.grid import percent
from longctx.lora.sizes import megabytes
from longctx.storage.files import read_record, write_text

STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem;color:#222}"
    "table{border-collapse:collapse;margin:1rem 0}"
    "td,th{padding:.25rem .75rem;border-bottom:1px solid #ddd;text-align:right}"
    "td:first-child,th:first-child{text-align:left}img{max-width:100%}pre{background:#f6f6f6;padding:1rem;overflow:auto}"
)


def run(config: ReportConfig) -> int:
    """Write RUN/report.html and print its path. Raises UserError where the folder holds no run or takes no file."""
    folder = Path(config.run)
    try:
        console.emit(str(write_page(folder)))
    except OSError as error:
        if error.filename != str(folder / "report.html"):
            raise
        raise UserError(
            f"{error.filename} cannot be written: {error.strerror}; copy the run's folder to where you may write, and "
            "give the copy, run=COPY (configs/report.yaml)"
        ) from None
    return 0


def write_page(folder: Path) -> Path:
    """Write RUN/report.html and return its path. Raises UserError when the folder holds no run."""
    if not (folder / "config.yaml").exists():
        raise UserError(f"run={folder} holds no config.yaml, so it is not the folder of a run; give runs/NAME")
    name, steps = folder.resolve().name, steps_of(folder)
    parts = [f"<h1>{html.escape(name)}</h1>", *_summary(folder), *_stages(folder, steps), *_curve(steps)]
    settings = (folder / "config.yaml").read_text(encoding="utf-8")
    parts.append(f"<h2>Settings</h2><pre>{html.escape(settings)}</pre>")
    title = f"longctx: {html.escape(name)}"
    page = f"<!doctype html><meta charset=utf-8><title>{title}</title><style>{STYLE}</style>" + "\n".join(parts)
    out = folder / "report.html"
    write_text(out, page)
    return out


def steps_of(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl that hold a step's loss; an incomplete last line is left out."""
    stored = folder / "metrics.jsonl"
    lines = stored.read_text(errors="replace", encoding="utf-8").splitlines(keepends=True) if stored.exists() else []
    whole = [json.loads(line) for line in lines if line.endswith("\n")]
    return [line for line in whole if line.get("loss") is not None and "stage" in line]


def finished_stages(folder: Path) -> list[dict[str, Any]]:
    """Return the finished.json of each trained stage, in the order of training. Raises UserError for a damaged one."""
    what = "the record of a finished stage"
    remedy = (
        "put it back from a copy, or delete it: `longctx train` with the run's settings makes the last stage's again, "
        "and without an earlier stage's the report leaves that stage out"
    )
    marks = [read_record(path, what, remedy) for path in (folder / "stages").glob("*/finished.json")]
    # A stage's index counts the stages of the start that trained it, of which another start may select others.
    return sorted(marks, key=lambda mark: (mark.get("step", 0), mark.get("index", 0), mark["seq_len"]))


def _summary(folder: Path) -> Iterable[str]:
    stored = folder / "summary.json"
    if not stored.exists():
        return
    summary = read_record(stored, "the results of the run", "`longctx train` with the run's settings writes it again")
    if summary["needle"]:
        lengths = _columns(summary["needle"])
        yield "<h2>Needles found</h2>"
        rows = [
            [name, *(_percent(found.get(length)) for length in lengths), _percent(summary["needle_pooled"][name])]
            for name, found in summary["needle"].items()
        ]
        yield _table(["model", *(f"{int(length):,}" for length in lengths), "pooled"], rows)
    picture = folder / "eval" / "needle.png"
    if picture.exists():
        yield _image(picture.read_bytes(), "needle grids")
    if summary["loss"]:
        windows = _columns(summary["loss"])
        yield "<h2>Loss on held-out text</h2>"
        losses = [[name, *(_number(found.get(w)) for w in windows)] for name, found in summary["loss"].items()]
        yield _table(["model", *(f"{int(w):,} tokens" for w in windows)], losses)
    yield from _changes(summary)
    yield from _by_position(summary.get("loss_by_position", {}))
    if summary.get("adapter"):
        size = megabytes(summary["adapter"]["bytes"])
        rank, profile = summary["adapter"]["rank"], summary["adapter"]["profile"]
        share = f", {summary['adapter']['share']:.1%} of the change" if "share" in summary["adapter"] else ""
        yield f"<p>Adapter: rank {rank}, {size}, profile {html.escape(profile)}{share}.</p>"


def _changes(summary: Mapping[str, Any]) -> Iterable[str]:
    """Yield what the extension costs and gains in loss: before, after, and the change in percent."""
    changes = summary.get("changes", {})
    titles = {"extended": "base and extended", "merged": "sibling without and with the adapter"}
    rows = [
        [titles[name], row["text"], _number(row["before"]), _number(row["after"]),
         f"{row['after'] / row['before'] - 1:+.1%}"]
        for name, found in changes.items() for row in found
    ]  # fmt: skip
    if rows:
        yield "<h2>What it costs and gains</h2>"
        yield "<p>Loss on held-out text and conversations, nats per token. A rise is a cost.</p>"
        yield _table(["models", "text", "before", "after", "change"], rows)


def _by_position(curves: Mapping[str, Mapping[str, float]]) -> Iterable[str]:
    """Yield the loss by position in the longest held-out sequences, a column per model."""
    if not curves:
        return
    ends = _columns(curves)
    starts = ["0", *ends]
    rows = [
        [f"{int(start) + 1:,} to {int(end):,}", *(_number(curve.get(end)) for curve in curves.values())]
        for start, end in zip(starts, ends, strict=False)
    ]
    yield f"<h2>Loss by position in {int(ends[-1]):,} tokens</h2>"
    yield _table(["positions", *curves], rows)


def _columns(values: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Return the lengths for which any model has a value, ascending."""
    return sorted({length for found in values.values() for length in found}, key=int)


def _percent(share: float | None) -> str:
    return "" if share is None else f"{percent(share)} %"


def _number(loss: float | None) -> str:
    return "" if loss is None else f"{loss:.4f}"


def _stages(folder: Path, steps: Sequence[Mapping[str, Any]]) -> Iterable[str]:
    marks = finished_stages(folder)
    if not marks:
        return
    last = {line["stage"]: line for line in steps}
    yield "<h2>Stages</h2>"
    rows = [
        [
            m["stage"],
            f"{m['seq_len']:,}",
            f"{m['theta']:,.0f}",
            f"{m['tokens']:,}",
            _steps(m),
            _number(last.get(m["stage"], {}).get("loss")),
            _number(m.get("heldout_loss")),
            f"{m['seconds']:.0f}",
            *_ranks(last.get(m["stage"], {})),
        ]
        for m in marks
    ]
    head = ["stage", "length", "theta", "tokens", "steps", "last loss", "held-out loss", "seconds", "nodes x ranks"]
    yield _table([*head, "schedule and links"], rows)


def _steps(mark: Mapping[str, Any]) -> str:
    """The steps of a stage, and of how many where it was left early (`advance`)."""
    planned = mark.get("planned_steps", mark["steps"])
    return f"{mark['steps']} of {planned}" if mark["steps"] < planned else str(mark["steps"])


def _ranks(line: Mapping[str, Any]) -> list[str]:
    """The nodes and ranks that took a step, and its rings; empty for runs of before these were recorded."""
    if "rings" not in line:
        return ["", ""]
    return [f"{line['nodes']} x {line['ranks_per_node']}", line["rings"]]


def _curve(steps: Sequence[Mapping[str, Any]]) -> Iterable[str]:
    """Draw the loss over tokens, with a line per stage."""
    if not steps:
        return
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(9, 3.5), layout="constrained")
    stages = list(dict.fromkeys(line["stage"] for line in steps))
    for stage in stages:
        own = [line for line in steps if line["stage"] == stage]
        marker = "o" if len(own) == 1 else None  # a line of one point shows nothing
        axis.plot([line["tokens"] for line in own], [line["loss"] for line in own], linewidth=1, marker=marker)
    axis.set_xlabel("tokens")
    axis.set_ylabel("training loss (weighted)")
    # A list of labels allows names that begin with "_"; "$" would begin a formula.
    axis.legend(axis.get_lines(), [stage.replace("$", r"\$") for stage in stages])
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    plt.close(figure)
    yield "<h2>Training loss</h2>"
    yield _image(buffer.getvalue(), "training loss")


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    top = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(str(c))}</td>" for c in row) + "</tr>" for row in rows)
    return f"<table><tr>{top}</tr>{body}</table>"


def _image(data: bytes, alt: str) -> str:
    return f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{base64.b64encode(data).decode()}">'
