"""The words of a command line: options apart from overrides, and each override checked against the schema and the
groups before Hydra composes anything.

What is unknown, misspelt, renamed or meant for another tool is decided here, from our own tables; Hydra only parses
the grammar of one override, chooses groups and applies values.
"""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from longctx.config.groups import choice_file, defaults_of, groups
from longctx.config.keys import known_keys, step_into, unknown_key_message, variants
from longctx.config.renamed import INSTEAD
from longctx.errors import UserError, nearest

# Hydra's own options and what does their work here.
_HYDRA_OPTIONS = {
    "--info": "`longctx doctor` shows the machine and --cfg the config",
    "--run": "a verb runs by itself",
    "--resolve": "--cfg always prints resolved values",
    "--package": "--cfg prints the whole config",
    "--config-name": "every verb has its own root config; add group files with --config-dir",
    "--config-path": "every verb has its own root config; add group files with --config-dir",
    "--hydra-help": "--help shows what can be set",
    "--experimental-rerun": "starting the same command again continues a run",
    "--shell-completion": "`longctx completion bash` prints the script to source",
}
_SHORT = {"-m": "--multirun", "-c": "--cfg", "-h": "--help", "-r": "--run", "-p": "--package", "-cd": "--config-dir",
          "-cn": "--config-name", "-cp": "--config-path", "-sc": "--shell-completion"}  # fmt: skip
_QUOTES = "\"'"
_HOME = re.compile(r"^([^=]+=[\"']?)~/")  # a shell leaves ~/ as it is behind model.path=
_HYDRA_KEYS = "Hydra only composes the config here: name=... or run_dir=... say where a run goes, logging=... what it "
_HYDRA_KEYS += "says, -m sweeps one run after another, launch.nproc=N or torchrun and srun start ranks"


@dataclass
class CommandLine:
    """overrides: the Hydra overrides. folders: the user's own configs. topics: plain words after --help."""

    overrides: list[str] = field(default_factory=list)
    folders: list[Path] = field(default_factory=list)
    topics: list[str] = field(default_factory=list)
    help: bool = False
    cfg: bool = False
    multirun: bool = False


def parse(words: Sequence[str]) -> CommandLine:
    """Options and overrides, apart. Raises UserError for an option that does not exist."""
    if undecoded := [word for word in words if any("\ud800" <= letter <= "\udfff" for letter in word)]:
        raise UserError(
            f"{undecoded[0]!r} holds bytes that are not UTF-8 (shown as \\udcNN), and the files of a run are UTF-8; "
            "rename the file or folder, or make a link with another name (the command line)"
        )
    line = CommandLine(help=any(word in ("-h", "--help") for word in words))
    queue = list(words)
    while queue:
        word = queue.pop(0)
        name, equals, value = word.partition("=") if word.startswith("--") else (word, "", "")
        name = _SHORT.get(name, name)
        if name == "--config-dir":
            if not equals and not queue:
                raise UserError("--config-dir needs a folder after it")
            line.folders.append(Path(value if equals else queue.pop(0)))
        elif name == "--cfg":
            what = value if equals else queue.pop(0) if queue[:1] in (["job"], ["hydra"], ["all"]) else "job"
            if what != "job":
                raise UserError(f"--cfg {what}: there is no config but the verb's own; --cfg prints it")
            line.cfg = True
        elif name == "--multirun":
            line.multirun = True
        elif name == "--help":
            continue
        elif name in _HYDRA_OPTIONS:
            raise UserError(f"{word} is an option of Hydra that longctx does not have: {_HYDRA_OPTIONS[name]}")
        elif word.startswith("-"):
            raise UserError(f"{word} is not an option; settings are written key=value, and --help shows them")
        elif line.help and "=" not in word and word[0] not in "+~":
            line.topics.append(word)
        else:
            line.overrides.append(_HOME.sub(lambda found: f"{found[1]}{Path.home()}/", word))
    for folder in line.folders:
        if not folder.is_dir():
            raise UserError(f"--config-dir {folder} is not a folder; give the folder that holds your group folders")
    return line


class Overrides:
    """The overrides a verb's root takes: `checked` gives Hydra's words for one of the user's."""

    def __init__(self, root: str, kind: Any, folders: Sequence[Path] = ()) -> None:
        self.root, self.kind, self.folders = root, kind, folders
        self.options = set(defaults_of(root))
        self.choices = groups(folders)
        self.own = {name for folder in folders for name in groups_in(folder)}
        self.origin = f"configs/{root}.yaml and the command line"

    def checked(self, word: str) -> list[str]:
        """One word as Hydra shall read it; a `~key` of the config itself comes back alone, for `compose` to drop."""
        override = self.parsed(word)
        key = override.get_key_element().lstrip("+~")
        if override.is_sweep_override():
            raise UserError(f"{word} gives several values; -m runs one after another: longctx VERB -m {word} "
                            f"(or, for a list, '{key}=[{word.partition('=')[2]}]')")  # fmt: skip
        option = self._option(key, override.value())
        if option is not None:
            return [self._choice(word, option, override)]
        path = self._path(word, key)
        if override.is_delete():
            return [f"~{'.'.join(path)}"]
        return self._values(".".join(path), override)

    def expand(self, words: Sequence[str]) -> Iterator[dict[str, str]]:
        """Every combination of the values that swept words give: {key: value}, single-valued words left out."""
        swept = {}
        for word in words:
            override = self.parsed(word)
            if not override.is_sweep_override():
                continue
            key = override.get_key_element()
            if not override.is_discrete_sweep():
                raise UserError(f"{word}: an interval has no end of values; name them, {key}=a,b, or range(1,8,2)")
            values = override._value
            swept[key] = (
                values.filter(self.choices.get(key, [])) if hasattr(values, "filter") else
                list(override.sweep_string_iterator())
            )  # fmt: skip
        for values in itertools.product(*swept.values()):
            yield dict(zip(swept, values, strict=True))

    def parsed(self, word: str) -> Any:
        """Hydra's reading of one word; a value with spaces, brackets or letters beyond ASCII inside is text.

        Raises UserError where Hydra has no reading.
        """
        from hydra.core.override_parser.overrides_parser import OverridesParser
        from hydra.errors import HydraException

        bare = word.lstrip("+~")
        if bare == "hydra" or bare.startswith(("hydra.", "hydra/")):
            raise UserError(f"{word} would set Hydra itself, which longctx does not take. {_HYDRA_KEYS}")
        if ("=" not in word and not word.startswith("~")) or bare.startswith("="):
            raise UserError(f"{word!r} is not an override; write key=value (lists in quotes: 'key=[a,b]'), or --help")
        key, _, value = word.partition("=")
        try:
            return OverridesParser.create().parse_override(word)
        except HydraException:
            if value[:1] not in {"[", "{", *_QUOTES} and not {",", '"'} & set(value):
                with contextlib.suppress(UserError):  # which would quote what the user has not typed
                    return self.parsed(f'{key}="{value}"')
            raise UserError(
                f"{word!r} cannot be read: close every bracket and quote, and write text with spaces, commas or other "
                f"signs in quotes inside the shell's: '{key}={_quoted(value)}'"
            ) from None

    def _option(self, key: str, value: Any) -> str | None:
        """The group a word chooses from; `train.model=tiny` is short for `model@train.model=tiny`."""
        if key in self.options:
            return key
        placed = {option.partition("@")[2]: option for option in self.options if "@" in option}
        if key in placed and isinstance(value, str):
            return placed[key]
        own = key in self.own and isinstance(value, str) and choice_file(key, value, self.folders) is not None
        return key if own else None

    def _choice(self, word: str, option: str, override: Any) -> str:
        group = option.partition("@")[0]
        if override.is_delete():
            return word
        values = override.value() if isinstance(override.value(), list) else [override.value()]
        for value in values:
            if choice_file(group, str(value), self.folders) is None:
                raise UserError(self.not_a_choice(group, "null" if value is None else str(value)))
        return f"{'' if option in self.options else '+'}{option}={override.get_value_element_as_str()}"

    def not_a_choice(self, group: str, choice: str) -> str:
        """The message for group=choice without a file."""
        if instead := INSTEAD.get(f"{group}={choice}"):
            return f"{group}={choice} is not a choice; instead: {instead} ({self.origin})"
        known = self.choices.get(group, [])
        if choice.endswith((".yaml", ".yml")) or "/" in choice:
            name = Path(choice).stem
            return (
                f"{group}={choice} is not a choice: a choice is a name, and a file of your own is "
                f"FOLDER/{group}/{name}.yaml, given as --config-dir FOLDER {group}={name}; known: {', '.join(known)} "
                f"({self.origin})"
            )
        near = nearest(choice, known)
        hint = f"did you mean {group}={near}? " if near else ""
        return f"{group}={choice} is not a choice; {hint}known: {', '.join(known)} ({self.origin})"

    def _path(self, word: str, key: str) -> list[str]:
        """The key's parts. Raises UserError where one of them does not exist."""
        kind, path = self.kind, key.split(".")
        if path[0] == "rope" and not step_into(kind, "rope") and step_into(kind, "curriculum"):
            path = ["curriculum", "rule", *path[1:]]
        for index, part in enumerate(path):
            inside = step_into(kind, part)
            if inside is None:
                above = ".".join(path[:index])
                known = list(
                    dict.fromkeys([*known_keys(kind), *(() if index else (o.partition("@")[0] for o in self.options))])
                )
                if not known:
                    raise UserError(f"{word}: {above} has no keys inside it; write {above}=... ({self.origin})")
                message = unknown_key_message(".".join(path[: index + 1]), known, self.kind, path[index + 1 :])
                raise UserError(f"{message} ({self.origin})")
            kind = inside
        return path

    def _values(self, key: str, override: Any) -> list[str]:
        """`++key=value`: that the key exists is known.

        A rule replaces the rule before it, parameters and all, and `{}` replaces a section; other braces add to it.
        """
        value = override.get_value_element_as_str()
        kind: Any = self.kind
        for part in key.split("."):
            kind = step_into(kind, part)
        if key in self.choices and isinstance(override.value(), str):
            raise UserError(
                f"{key}={value}: this command has no choices of {key}; give its keys, such as "
                f"{key}.{known_keys(kind)[0]}=... ({self.origin})"
            )
        if variants(kind) and isinstance(override.value(), str | dict):
            rule = f"{{name:{value}}}" if isinstance(override.value(), str) else value
            return [f"++{key}=null", f"++{key}={rule}"]
        if override.value() == {}:  # Hydra would add nothing to what is there
            return [f"++{key}=null", f"++{key}={{}}"]
        return [f"++{key}={value}"]


def groups_in(folder: Path) -> list[str]:
    """The names of the groups in one folder of configs."""
    return [path.name for path in folder.iterdir() if path.is_dir()]


def _quoted(value: str, *, inside: bool = False) -> str:
    """A value that cannot be read, with its text in quotes: in a map or a list that of each entry that needs it."""
    inner = value[1:].removesuffix("}" if value[:1] == "{" else "]")
    if value[:1] == "{":
        pairs = [pair.partition(":") for pair in re.split(r",\s*(?=[^,:{}]+:)", inner)]
        return "{" + ", ".join(f"{name.strip()}: {_quoted(text.strip(), inside=True)}" for name, _, text in pairs) + "}"
    if value[:1] == "[" and re.search(r"[\[{]", inner):  # maps in a list: the entries are not told apart here
        return '[{key: "text"},...]'
    if value[:1] == "[":
        return "[" + ",".join(_quoted(text.strip(), inside=True) for text in inner.split(",")) + "]"
    plain = re.fullmatch(r"[\w./-]+", value) and inside
    return value if plain else f'"{value.strip(_QUOTES)}"'
