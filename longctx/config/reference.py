"""Writes the reference pages of the documentation from the schemas: `python -m longctx.config.reference`.

Each verb gets one page with every group and key; docs/reference holds what this module writes, and nothing else.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator

from longctx.config.groups import choice_file, config_dir, defaults_of, groups, header
from longctx.config.help import Row, keys, section_doc
from longctx.verbs import VERBS, Verb

FOLDER = config_dir().parent / "docs" / "reference"

# The end of a key's name, or of its type, and the unit that it stands for.
UNITS = {
    "_seconds": "seconds", "_minutes": "minutes", "_gib": "GiB", "_mib": "MiB", "_mb": "MB", "_gbytes": "GB/s",
    "_us": "microseconds", "tflops": "TFLOP/s", "_steps": "steps", "seconds": "seconds", "minutes": "minutes",
}  # fmt: skip

INDEX = """# Reference

Every verb and every key, written from the schemas by `python -m longctx.config.reference`; `longctx VERB --help` shows
the same on the terminal. [The command line](../command_line.md) explains overrides, groups, sweeps and rules, and
[the library](../api.md) lists the Python functions.

| verb | what it does |
|---|---|
{verbs}

## How values are written

| type | examples |
|---|---|
| length | tokens: `8192`, `64k` (65,536), `1M` (1,048,576), customary names such as `262k` (262,144) |
| count | `100000000`, `1e8`, `100M`: powers of ten |
| text, int, number, true / false | `name=try1`, `seed=3`, `guards.spike_factor=2.0`, `smoke=true`; `null` |
| [type] | a list, in quotes: `'curriculum.only=[s65k,s262k]'` |
| {{name: type}} | values by name: `'parallel.cp_by_stage={{s64k: 8}}'` |
| rule | a rope rule: `rope=yarn`, or with parameters `rope=yarn rope.beta_fast=16` |

A key that ends in `_seconds`, `_gib` and the like is in that unit; the type column repeats it. `NAME` in a key stands
for a name of yours, such as a stage's or a source's. `(required)` has no default.
"""


def pages() -> dict[str, str]:
    """Return the Markdown text of every reference page by file name."""
    verbs = "\n".join(f"| [`{verb.name}`]({verb.root}.md) | {verb.help} |" for verb in VERBS.values())
    return {"index.md": INDEX.format(verbs=verbs)} | {f"{verb.root}.md": _page(verb) for verb in VERBS.values()}


def _page(verb: Verb) -> str:
    lines = [f"# longctx {verb.name}", "", f"{verb.help[0].upper()}{verb.help[1:]}.", ""]
    about = header(config_dir() / f"{verb.root}.yaml")
    first = next((number for number, line in enumerate(about) if line.endswith((".", ":"))), 0)
    if any(line.startswith("  ") for line in about[first + 1 :]):
        lines += ["```text", *about[first + 1 :], "```", ""]
    lines += _groups(verb)
    top: list[Row] = []
    sections: dict[str, list[Row]] = {}
    for row in keys(verb):
        section, dot, _ = re.split(r"=", row[0])[0].partition(".")
        (sections.setdefault(section, []) if dot else top).append(row)
    if top:
        lines += ["## Keys", "", *_table(top)]
    for section, rows in sections.items():
        lines += [f"## {section}", "", _text(section_doc(verb, section)), "", *_table(rows)]
    return "\n".join(lines).rstrip() + "\n"


def _groups(verb: Verb) -> Iterator[str]:
    """The groups from which the verb chooses, with the first line of each choice's file."""
    offered = groups()
    for option, chosen in defaults_of(verb.root).items():
        group = option.partition("@")[0]
        yield from (f"## {option}=CHOICE", "", "| choice | |", "|---|---|")
        for choice in offered[group]:
            file = choice_file(group, choice)
            about = " ".join(header(file)) if file is not None else ""
            first = re.split(r"(?<=\.)\s+(?=[A-Z])|\s{2,}", about)[0]
            default = " (default)" if choice == chosen else ""
            yield f"| `{choice}`{default} | {_text(first)} |"
        yield ""


def _table(rows: list[Row]) -> Iterator[str]:
    yield from ("| key | type | default | |", "|---|---|---|---|")
    for key, kind, default, doc in rows:
        yield f"| `{key}` | {_kind(key, kind)} | {_code(default)} | {_text(doc)} |"
    yield ""


def _kind(key: str, kind: str) -> str:
    """The type, with the unit that the key's name says."""
    shown = _text(kind.replace("|", " / "))
    unit = next((unit for end, unit in UNITS.items() if key.rpartition(".")[2].endswith(end)), "")
    return f"{shown}, {unit}" if unit and kind in ("int", "number", "{name: number}") else shown


def _code(value: str) -> str:
    package = str(config_dir().parent)
    return f"`{value.replace(package, 'PACKAGE')}`" if value and value != "(required)" else value


def _text(text: str) -> str:
    """Plain text as Markdown for a table's cell, with links to the pages that it names."""
    text = re.sub(r"([*<|\[\]])", r"\\\1", text).replace("\\<", "&lt;").replace("\\|", "&#124;")
    return re.sub(r"docs/(\w+)\.md", r"[docs/\1.md](../\1.md)", text)


def main() -> None:
    """Write all pages into docs/reference, and remove pages of verbs that are gone."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    wanted = pages()
    for file in FOLDER.glob("*.md"):
        if file.name not in wanted:
            file.unlink()
    for name, text in wanted.items():
        (FOLDER / name).write_text(text, encoding="utf-8")
    print(f"{len(wanted)} pages in {FOLDER}", file=sys.stderr)


if __name__ == "__main__":
    main()
