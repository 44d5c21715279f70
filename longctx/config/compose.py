"""Hydra, used once: a verb's root file plus overrides become one plain dict, and that the verb's dataclass.

Only this file, `words` and `sweep` know Hydra. No interpolation depends on the time, so that every rank composes the
same thing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import reduce
from importlib import import_module
from pathlib import Path
from typing import Any

from longctx.config.base import build
from longctx.config.groups import broken, config_dir
from longctx.config.words import Overrides
from longctx.errors import UserError, nearest
from longctx.verbs import VERBS, Verb


def load(verb: Verb, overrides: Sequence[str], folders: Sequence[Path] = ()) -> Any:
    """The validated config of a verb: its schema's dataclass."""
    values, origin = compose(verb.root, overrides, folders), f"configs/{verb.root}.yaml and the command line"
    config = build(resolve(verb.schema), values, origin=origin)
    missing = list(_missing(values))
    if missing and verb.name != "plan":  # a schedule is planned without a model
        raise UserError(f"{missing[0]} is missing; give it as {missing[0]}=... ({origin})")
    return config


def _missing(values: Any, path: tuple[str, ...] = ()) -> Iterator[str]:
    """Keys whose value is Hydra's mark of what must be given."""
    if isinstance(values, dict):
        for key, value in values.items():
            yield from _missing(value, (*path, str(key)))
    elif values == "???":
        yield ".".join(path)


def resolve(target: str) -> Any:
    """The object that "module:name" names."""
    module, name = target.split(":")
    return getattr(import_module(module), name)


def schema_of(root: str) -> Any:
    """The schema of the verb whose root file is configs/ROOT.yaml."""
    return resolve(next(verb.schema for verb in VERBS.values() if verb.root == root))


def compose(root: str, overrides: Sequence[str], extra_dirs: Sequence[Path] = ()) -> dict[str, Any]:
    """Compose configs/ROOT.yaml with Hydra overrides.

    extra_dirs: the user's own folders of configs; they are searched after the packaged ones.
    Raises UserError for a bad override, an unknown key, group or choice.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException, MissingConfigException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import MarkedYAMLError

    known = Overrides(root, schema_of(root), extra_dirs)
    words = [item for word in overrides for item in known.checked(word)]
    drops = [word[1:] for word in words if word[0] == "~" and word[1:] not in known.options]
    words = [word for word in words if word.removeprefix("~") not in drops]
    if extra_dirs:
        words.append(f"hydra.searchpath=[{','.join('file://' + str(d.resolve()) for d in extra_dirs)}]")
    OmegaConf.register_new_resolver("asset", _asset, replace=True)
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(config_dir=str(config_dir()), version_base="1.3"):
            composed = hydra_compose(config_name=root, overrides=words)
        OmegaConf.set_struct(composed, False)
        for key in drops:
            _drop(composed, key, known)
        values = OmegaConf.to_container(composed, resolve=True)
    except MissingConfigException as error:
        group, _, choice = (error.missing_cfg_file or "").rpartition("/")
        raise UserError(known.not_a_choice(group, choice) if group else str(error)) from None
    except OmegaConfBaseException as error:
        first = str(error).partition("\n")[0]
        raise UserError(f"{error.full_key or 'the config'} has no value: {first} ({known.origin})") from None
    except HydraException as error:
        raise UserError(f"{' '.join(str(error).split())} (composing {known.origin}: {' '.join(overrides)})") from None
    except MarkedYAMLError as error:
        raise UserError(broken(error, getattr(error.problem_mark, "name", "a config file"))) from None
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def _drop(composed: Any, key: str, known: Overrides) -> None:
    """`~key`: take a key out of the composed config."""
    *parents, last = key.split(".")

    def below(node: Any, part: str) -> Any:
        return node.get(part) if hasattr(node, "get") else None

    node = reduce(below, parents, composed)
    names = list(node or ())
    if last not in names:
        near = nearest(last, names)
        hint = f"did you mean {'.'.join([*parents, near])}?" if near else f"there is {', '.join(names) or 'nothing'}"
        raise UserError(f"~{key}: there is no {key} to drop; {hint} ({known.origin})")
    del node[last]


def _asset(name: str) -> str:
    """${asset:tiny}: a folder that ships inside the package, wherever the command is started."""
    return str(Path(__file__).resolve().parent.parent / "assets" / name)
