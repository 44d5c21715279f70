"""The folders of configs: which groups there are, what each offers, and which of them a verb's root file takes.

Reads file names and defaults lists only, so that help and tab completion answer without Hydra.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from longctx.errors import UserError


def config_dir() -> Path:
    """The packaged configs: inside the wheel, or at the top of a checkout."""
    package = Path(__file__).resolve().parent.parent
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def groups(extra_dirs: Sequence[Path] = ()) -> dict[str, list[str]]:
    """Each config group with its choices, the user's own folders included."""
    found: dict[str, set[str]] = {}
    for base in [config_dir(), *extra_dirs]:
        for folder in sorted(path for path in base.iterdir() if path.is_dir()):
            found.setdefault(folder.name, set()).update(p.stem for p in folder.glob("[!_]*.yaml"))
    return {name: sorted(choices) for name, choices in found.items() if choices}


def choice_file(group: str, choice: str, extra_dirs: Sequence[Path] = ()) -> Path | None:
    """The file behind group=choice."""
    files = [base / group / f"{choice}.yaml" for base in (config_dir(), *extra_dirs)]
    return next((file for file in files if file.is_file()), None)


def defaults_of(root: str) -> dict[str, str | None]:
    """The groups of a root file, in the command line's spelling, with the default choice of each.

    Examples: `model`, or `model@train.model`. The groups of the roots it builds on (plan on train) come first.
    """
    found: dict[str, str | None] = {}
    for entry in (read(config_dir() / f"{root}.yaml") or {}).get("defaults", []):
        if isinstance(entry, str) and entry != "_self_":
            found |= defaults_of(entry)
        elif isinstance(entry, dict):
            for name, choice in entry.items():
                found[name.removeprefix("override ").strip("/ ")] = choice
    return found


def read(file: Path) -> Any:
    """A YAML file as plain data. Raises UserError with the line where it cannot be read."""
    import yaml

    try:
        return yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.MarkedYAMLError as error:
        raise UserError(broken(error, str(file))) from None


def broken(error: Any, file: str) -> str:
    """What is wrong with a file that is no YAML."""
    mark = error.problem_mark or error.context_mark
    line = f", line {mark.line + 1}" if mark is not None else ""
    return f"{file}{line} is not valid YAML: {error.problem or error.context}"


def header(file: Path) -> list[str]:
    """The comment a config file opens with, without its marks."""
    lines = []
    for line in file.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        if not line.startswith("# @package"):
            lines.append(line.removeprefix("#").removeprefix(" "))
    return lines
