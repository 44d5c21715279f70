"""`longctx VERB [SUBVERB] [group=choice] [key=value] ...`: composes and validates the config once, then runs.

Exit status: 0 done, 1 failure, 2 the user's mistake (one paragraph, no traceback), 75 saved and to be
requeued, 130 interrupted.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from functools import reduce
from pathlib import Path
from typing import Any

from longctx import collector, console, signals
from longctx.errors import RunFailed, UserError, first_line, nearest, out_of_memory, refused_by_system
from longctx.opening import opening
from longctx.verbs import VERBS, Verb
from longctx.versions import check_versions

_FAMILIES = {name.split()[0] for name in VERBS} - set(VERBS)  # first words that are no verbs by themselves


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of the `longctx` command; returns the exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    own = arguments is None  # a process of its own
    owns = own and words[:1] != ["bench"]  # benchmarks undo what they did to the machine themselves
    if owns and words[:1] in (["train"], ["preflight"]) and _is_one_of_several():
        from longctx.run import command

        return command.main(words[1:] if words[0] == "train" else words)
    if owns:
        from longctx.distributed.launcher import quiet_torch

        quiet_torch()
        first = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"
        signals.catch(requeue=words[:1] == ["train"], speaks=first)
        if words[:1] == ["train"]:
            collector.begin_imports()
    try:
        return _dispatch(words, own=own)
    except UserError as error:
        print(f"longctx: {error}", file=sys.stderr)
        return 2
    except RunFailed as error:
        print(f"longctx: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("longctx: interrupted", file=sys.stderr)
        return signals.INTERRUPTED
    except BrokenPipeError:
        return 1
    except Exception as error:
        if text := refused_by_system(error):
            print(f"longctx: {text}", file=sys.stderr)
            return 1
        if not out_of_memory(error):
            raise
        print(f"longctx: {_no_memory(error)}", file=sys.stderr)
        return 1
    finally:
        if owns:
            signals.done()


def _is_one_of_several() -> bool:
    """Whether torchrun or srun started this process as one of several ranks."""
    return os.environ.get("WORLD_SIZE", os.environ.get("SLURM_STEP_NUM_TASKS", "1")) != "1"


def _no_memory(error: Exception) -> str:
    from longctx.host_memory import peak_resident

    peak = peak_resident() / 2**30
    said = first_line(error)
    return (
        f"out of memory ({said}); this process held {peak:.1f} GiB on the host at its peak. Shorter lengths, fewer at "
        "a time, a smaller dtype, more ranks or a larger machine would help; `longctx VERB --help` has the settings"
    )


def _dispatch(words: list[str], *, own: bool) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(_help())
        return 0
    if words[0] == "--version":
        from longctx import __version__

        print(f"longctx {__version__}")
        return 0
    if words[0] == "completion":
        from longctx.completion import script

        print(script(words[1:]), end="")
        return 0
    if words[0] in _FAMILIES and not [word for word in words[1:] if word not in ("-h", "--help")]:
        print(_family(words[0]))
        return 0
    verb, rest = _find(words)
    check_versions()
    from longctx.config.words import parse

    line = parse(rest)
    if line.help:
        from longctx.config.help import verb_help

        print(verb_help(verb, line))
        return 0
    from longctx.config.compose import load, resolve

    if line.multirun:
        from longctx.sweep import sweep

        return sweep(verb, line)
    config = load(verb, line.overrides, line.folders)
    if line.cfg:
        from longctx.config.help import as_yaml

        print(as_yaml(config), end="")
        return 0
    _check_outputs(verb, config)
    if (text := opening(verb.name, config)) and os.environ.get("RANK", "0") == "0":
        print(f"longctx: {text} ...", file=sys.stderr, flush=True)
    if own and (getattr(config, "format", "text") == "json" or getattr(config, "dry_run", False)):
        console.keep_for_the_document()
    run = resolve(verb.run)
    return int((run(config, [*_folders(line.folders), *line.overrides]) if verb.words else run(config)) or 0)


def _check_outputs(verb: Verb, config: Any) -> None:
    """Refuse a path that cannot be written before a verb begins its work."""
    from longctx.storage.files import check_picture, check_writable

    folders = verb.folders if getattr(config, "search", True) else ()  # theta's folder is that of a search
    for key in (*verb.files, *folders):
        value = reduce(lambda part, name: getattr(part, name, None), key.split("."), config)
        if isinstance(value, str) and value:
            # config.folder is computed from run_dir: name the key that the user gives
            named = "run_dir" if key == "folder" and hasattr(config, "run_dir") else key
            check_writable(Path(value).expanduser(), named, folder=key in folders)
            if key == "png":
                check_picture(Path(value), key)


def _folders(folders: Sequence[Path]) -> list[str]:
    return [word for folder in folders for word in ("--config-dir", str(folder.resolve()))]


def _find(words: list[str]) -> tuple[Verb, list[str]]:
    two = " ".join(words[:2])
    if two in VERBS:
        return VERBS[two], words[2:]
    subverbs = sorted(name.split()[1] for name in VERBS if name.startswith(words[0] + " "))
    if (spaced := words[0].replace("-", " ")) in VERBS:
        if subverbs and words[1:2] and words[1].isalpha() and not {"-h", "--help"} & set(words):
            near = nearest(words[1], subverbs)
            hint = f"did you mean '{words[0]} {near}'? " if near else ""
            raise UserError(
                f"{two!r} is not a verb; {hint}{words[0]} alone takes key=value, and has {', '.join(subverbs)}"
            )
        return VERBS[spaced], words[1:]
    if words[0] in _FAMILIES:
        near = nearest(words[1], subverbs)
        hint = f"; did you mean {near!r}?" if near else ""
        raise UserError(f"{two!r} is not a verb; {words[0]} has {', '.join(subverbs)}{hint}")
    near = nearest(words[0], {"completion", *(name.split()[0] for name in VERBS)})
    hint = f"did you mean {near!r}? " if near else ""
    raise UserError(f"{words[0]!r} is not a verb; {hint}`longctx --help` lists them")


def _family(first: str) -> str:
    """The subverbs of a word that is no verb by itself, such as `lora`."""
    names = [name for name in VERBS if name.startswith(first + " ")]
    width = max(map(len, names))
    lines = [f"usage: longctx {first} SUBVERB [group=choice] [key=value] ... [OPTION] ...", ""]
    lines += [f"  {name:<{width}}  {VERBS[name].help}" for name in names]
    return "\n".join([*lines, "", f"`longctx {names[0]} --help` shows what can be set."])


def _help() -> str:
    width = max(len(name) for name in VERBS)
    lines = ["longctx extends a language model's context window by continued pretraining.", ""]
    lines += ["usage: longctx VERB [SUBVERB] [group=choice] [key=value] ... [OPTION] ...", ""]
    lines += [f"  {name:<{width}}  {VERBS[name].help}" for name in VERBS]
    lines += [
        "",
        "`longctx VERB --help` shows what can be set, `longctx VERB --help SECTION` a section's keys.",
        "--config-dir FOLDER adds your own group files, --cfg prints the composed config and runs nothing,",
        "-m runs every combination of values given as key=a,b. `longctx completion bash` (zsh, fish) prints a script",
        "to source for tab completion. Start with: longctx train experiment=quickstart",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit("longctx: start it as `longctx` or `python -m longctx`")
