"""Tab completion: `longctx completion bash` prints a script to source; the shell then asks this module on each tab.

Completes verbs, groups and their choices, keys section by section, the names of stages, and values where a key has a
closed set of them. Reads file names and schemas only: no Hydra, no torch.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from longctx.errors import UserError, nearest
from longctx.verbs import VERBS, Verb

_OPTIONS = ["--help", "--cfg", "--multirun", "--config-dir"]
_ASK = "-m longctx.completion"

# COMP_WORDBREAKS holds = and :, so bash replaces only what comes after the last of them: the answers are cut there.
_BASH = """_longctx() {{
    local word="${{COMP_LINE:0:COMP_POINT}}" IFS=$'\\n' head answer
    word="${{word##*[[:space:]]}}"
    head="${{word%"${{COMP_WORDS[COMP_CWORD]#[=:]}}"}}"
    COMPREPLY=()
    for answer in $({python} {ask} "${{COMP_LINE:0:COMP_POINT}}" 2>/dev/null); do
        COMPREPLY+=("${{answer#"$head"}}")
    done
    [[ ${{#COMPREPLY[@]}} -eq 1 && ${{COMPREPLY[0]}} == *[=.] ]] && compopt -o nospace 2>/dev/null
}}
complete -o default -o nosort -F _longctx longctx
"""
_ZSH = """#compdef longctx
_longctx() {{
    local -a answers open
    answers=("${{(@f)$({python} {ask} "$LBUFFER" 2>/dev/null)}}")
    open=("${{(@M)answers:#*[=.]}}")
    answers=("${{(@)answers:#*[=.]}}")
    compadd -Q -S '' -a open
    compadd -Q -a answers
    [[ -n "$answers$open" ]] || _files
}}
compdef _longctx longctx
"""
_FISH = """complete -c longctx -f -a '({python} {ask} (commandline -cp) 2>/dev/null)'
"""
_SCRIPTS = {"bash": _BASH, "zsh": _ZSH, "fish": _FISH}
_INSTALL = {
    "bash": 'source <(longctx completion bash)        # in ~/.bashrc',
    "zsh": 'source <(longctx completion zsh)         # in ~/.zshrc, after compinit',
    "fish": 'longctx completion fish > ~/.config/fish/completions/longctx.fish',
}  # fmt: skip


def script(words: Sequence[str]) -> str:
    """The completion script for one shell."""
    if list(words[:1]) not in [[shell] for shell in _SCRIPTS]:
        how = "\n".join(f"  {line}" for line in _INSTALL.values())
        near = nearest(words[0], _SCRIPTS) if words and words[0] not in ("-h", "--help") else None
        hint = f"; did you mean {near!r}?" if near else ""
        raise UserError(f"`longctx completion` takes one of {', '.join(_SCRIPTS)}{hint}. To install:\n{how}")
    made = _SCRIPTS[words[0]].format(python=f"'{sys.executable}'", ask=_ASK)
    return f"# {_INSTALL[words[0]]}\n{made}" if words[0] != "zsh" else made


def complete(line: str) -> list[str]:
    """What the last word of a command line may become, the whole word each time."""
    *words, last = line.split(" ")[1:] if " " in line else [""]
    words = [word for word in words if word]
    for taken in (2, 1):
        name = " ".join(words[:taken])
        if len(words) >= taken and name in VERBS:
            found = _inside(VERBS[name], words[taken:], last)
            if taken == 1 and len(words) == 1:
                found += _subverbs(words[0])
            return _starting(found, last)
    if len(words) == 1:
        return _starting(_subverbs(words[0]) or (["bash", "zsh", "fish"] if words[0] == "completion" else []), last)
    return [] if words else _starting([*dict.fromkeys(name.split()[0] for name in VERBS), "completion", "--help"], last)


def _starting(found: Sequence[str], start: str) -> list[str]:
    return sorted({answer for answer in found if answer.startswith(start)})


def _subverbs(first: str) -> list[str]:
    return [name.split()[1] for name in VERBS if name.startswith(first + " ")]


def _inside(verb: Verb, words: Sequence[str], last: str) -> list[str]:
    """Options, groups, keys and values for the word `last` of a verb."""
    from longctx.config.compose import resolve
    from longctx.config.groups import defaults_of, groups

    if last.startswith("-"):
        return _OPTIONS
    mark = last[: len(last) - len(last.lstrip("+~"))]
    folders = [Path(b) for a, b in pairwise(words) if a == "--config-dir" and Path(b).is_dir()]
    offered, chosen = groups(folders), defaults_of(verb.root)
    own = [group for group in offered if any((folder / group).is_dir() for folder in folders)]
    chosen = {**dict.fromkeys(own), **chosen}
    key, equals, _ = last[len(mark) :].partition("=")
    kind = resolve(verb.schema)
    if equals:
        values = offered.get(key.partition("@")[0], []) if key in chosen else _values(kind, key)
        return [f"{mark}{key}={value}" for value in values]
    above = key.rpartition(".")[0]
    below = _keys(kind, above, {**chosen, **dict(word.split("=", 1) for word in words if "=" in word)}, folders)
    top = [] if above else [f"{group}=" for group in chosen] + (["rope="] if "curriculum." in below else [])
    return [f"{mark}{answer}" for answer in [*top, *below]]


def _keys(kind: Any, above: str, chosen: dict[str, Any], folders: Sequence[Path]) -> list[str]:
    """The keys below a section, ending in `=` where they take a value and in `.` where they have keys of their own."""
    from longctx.config.keys import known_keys, members, step_into, variants

    path = above.split(".") if above else []
    for part in path:
        kind = step_into(kind, part)
    names, prefix = known_keys(kind), f"{above}." if above else ""
    if any(get_origin(member) is dict for member in members(kind)):
        names = _names(path, chosen, folders)
    found = []
    for name in names:
        inside = members(step_into(kind, name))
        section = any(dataclasses.is_dataclass(member) or get_origin(member) is dict for member in inside)
        rule = bool(variants(step_into(kind, name)))
        found += [f"{prefix}{name}."] if section else []
        found += [f"{prefix}{name}="] if not section or rule else []
    return found


def _names(path: Sequence[str], chosen: dict[str, Any], folders: Sequence[Path]) -> list[str]:
    """The names a group's chosen file gives: curriculum.stages of curriculum=tiny_16x."""
    from longctx.config.groups import choice_file, read

    file = choice_file(path[0], str(chosen.get(path[0])), folders)
    node = read(file) if file is not None else {}
    for part in path[1:]:
        node = node.get(part, {}) if isinstance(node, dict) else {}
    return list(node) if isinstance(node, dict) else []


def _values(kind: Any, key: str) -> list[str]:
    """The values of a key that has a closed set of them."""
    from longctx.config.keys import members, step_into, variants

    path = ["curriculum", "rule"] if key == "rope" and not step_into(kind, "rope") else key.split(".")
    for part in path:
        kind = step_into(kind, part)
    if variants(kind):
        return [one.name for one in variants(kind)]
    literals = [str(value) for member in members(kind) if get_origin(member) is Literal for value in get_args(member)]
    return literals + (["true", "false"] if bool in members(kind) else [])


if __name__ == "__main__":
    try:
        print("\n".join(complete(sys.argv[1] if len(sys.argv) > 1 else "")))
    except Exception:  # a shell's prompt is no place for a traceback
        sys.exit(1)
