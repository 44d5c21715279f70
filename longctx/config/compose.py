"""Hydra, used once: a verb's root file plus overrides become one plain dict.

Only this file and the command line know Hydra. Its errors are turned into the house's: the override, the
nearest known key or choice, and the file. No interpolation depends on the time, so that every rank composes
the same thing.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from longctx.errors import UserError, nearest


def config_dir() -> Path:
    """The packaged configs: inside the wheel, or at the top of a checkout."""
    package = Path(__file__).resolve().parent.parent
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def compose(root: str, overrides: Sequence[str], extra_dirs: Sequence[Path] = ()) -> dict[str, Any]:
    """Compose configs/ROOT.yaml with Hydra overrides.

    extra_dirs: the user's own folders of configs; they are searched after the packaged ones.
    Raises UserError for a bad override, an unknown key, group or choice.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    for folder in extra_dirs:
        if not folder.is_dir():
            raise UserError(f"--config-dir {folder} is not a folder; give the folder that holds your group folders")
    for override in overrides:
        if "=" not in override and not override.startswith("~"):
            raise UserError(
                f"{override!r} is not an override; write key=value (lists in quotes: 'key=[a,b]'), or --help"
            )
    OmegaConf.register_new_resolver("asset", _asset, replace=True)
    GlobalHydra.instance().clear()
    search = [f"hydra.searchpath=[{','.join('file://' + str(d.resolve()) for d in extra_dirs)}]"] if extra_dirs else []
    try:
        with initialize_config_dir(config_dir=str(config_dir()), version_base="1.3"):
            composed = hydra_compose(
                config_name=root, overrides=[*search, *(_forced(root, word) for word in overrides)]
            )
            values = OmegaConf.to_container(composed, resolve=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(_explain(error, root, overrides, extra_dirs)) from None
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def _asset(name: str) -> str:
    """${asset:tiny}: a folder that ships inside the package, wherever the command is started."""
    return str(Path(__file__).resolve().parent.parent / "assets" / name)


def _forced(root: str, override: str) -> str:
    """`key=value` as `++key=value`: whether the key exists is for the schema to say, which knows the keys that a
    root file leaves at their defaults and names the nearest one. Choices of the root's groups stay as they are.
    """
    key = override.split("=", 1)[0]
    return override if override[0] in "+~" or key in groups_of(root) else f"++{override}"


def groups_of(root: str) -> set[str]:
    """The groups in a root file's defaults list, and in those of the roots it builds on (plan on train)."""
    import yaml

    defaults = (yaml.safe_load((config_dir() / f"{root}.yaml").read_text()) or {}).get("defaults", [])
    names = [name for entry in defaults if isinstance(entry, dict) for name in entry]
    below = [groups_of(entry) for entry in defaults if isinstance(entry, str) and entry != "_self_"]
    return set().union(*below) | {
        name.split("@")[0].removeprefix("optional ").removeprefix("override ").strip("/ ") for name in names
    }


def split_options(words: Sequence[str]) -> tuple[list[str], list[Path]]:
    """Hydra overrides apart from `--config-dir FOLDER`, which may be given several times."""
    overrides: list[str] = []
    folders: list[Path] = []
    queue = list(words)
    while queue:
        word = queue.pop(0)
        if word == "--config-dir":
            if not queue:
                raise UserError("--config-dir needs a folder after it")
            folders.append(Path(queue.pop(0)))
        elif word.startswith("--config-dir="):
            folders.append(Path(word.split("=", 1)[1]))
        elif word.startswith("-"):
            raise UserError(f"{word} is not an option; settings are written key=value, and --help shows them")
        else:
            overrides.append(word)
    return overrides, folders


def groups(extra_dirs: Sequence[Path] = ()) -> dict[str, list[str]]:
    """Each config group with its choices, for --help and for messages."""
    found: dict[str, set[str]] = {}
    for base in [config_dir(), *extra_dirs]:
        for folder in sorted(path for path in base.iterdir() if path.is_dir()):
            found.setdefault(folder.name, set()).update(p.stem for p in folder.glob("[!_]*.yaml"))
    return {name: sorted(choices) for name, choices in found.items()}


def _explain(error: Exception, root: str, overrides: Sequence[str], extra_dirs: Sequence[Path]) -> str:
    text = str(error)
    where = f"configs/{root}.yaml"
    missing = re.search(r"Could not find '([\w-]+)/([^']+)'", text)
    if missing:
        choices = groups(extra_dirs).get(missing[1], [])
        near = nearest(missing[2], choices)
        hint = f"did you mean {missing[1]}={near}?" if near else ""
        return f"{missing[1]}={missing[2]} is not a choice; {hint} known: {', '.join(choices)} ({where})"
    unknown = re.search(r"Key '([^']+)' is not in struct\s+full_key: (\S+)", text) or re.search(
        r"Could not override '([^']+)'|Could not delete from config. '([^']+)'|"
        r"In '[^']*': Could not (?:find|override) '?(\S+?)'",
        text,
    )
    if unknown:
        key = next(group for group in reversed(unknown.groups()) if group)
        override = next((item for item in overrides if item.lstrip("+~").split("=")[0] == key), key)
        known = _keys(root, overrides, key, extra_dirs)
        near = nearest(key.rsplit(".", 1)[-1], [name.rsplit(".", 1)[-1] for name in known])
        prefix = key.rsplit(".", 1)[0] + "." if "." in key else ""
        hint = f"did you mean {prefix}{near}?" if near else f"known here: {', '.join(known)}"
        return f"{override}: {key} is not a known key; {hint} ({where})"
    first = " ".join(line.strip() for line in text.splitlines() if line.strip())
    return f"{first} (in the overrides {' '.join(overrides)}; {where})"


def _keys(root: str, overrides: Sequence[str], key: str, extra_dirs: Sequence[Path]) -> list[str]:
    """Keys that stand beside `key` once the unusable override is left out, plus the groups at the top."""
    rest = [item for item in overrides if item.lstrip("+~").split("=")[0] != key]
    values: Any = compose(root, rest, extra_dirs)
    for part in key.split(".")[:-1]:
        if not isinstance(values, dict) or part not in values:
            part_near = nearest(part, values if isinstance(values, dict) else [])
            return [part_near] if part_near else []
        values = values[part]
    names = list(values) if isinstance(values, dict) else []
    return names + (list(groups(extra_dirs)) if "." not in key else [])
