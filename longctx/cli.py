"""`longctx VERB [SUBVERB] [group=choice] [key=value] ...`: composes and validates the config once, then runs.

Exit status: 0 done, 1 failure, 2 the user's mistake (one paragraph, no traceback), 75 saved and to be
requeued, 130 interrupted.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from longctx import signals
from longctx.errors import RunFailed, UserError, nearest, out_of_memory
from longctx.opening import opening
from longctx.verbs import VERBS, Verb


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of the `longctx` command; returns the exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    owns = arguments is None and words[:1] != ["bench"]  # benchmarks undo what they did to the machine themselves
    if owns:
        first = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"
        signals.catch(requeue=words[:1] == ["train"], speaks=first)
    try:
        return _dispatch(words)
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
        if not out_of_memory(error):
            raise
        print(f"longctx: {_no_memory(error)}", file=sys.stderr)
        return 1
    finally:
        if owns:
            signals.done()


def _no_memory(error: Exception) -> str:
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # KiB on Linux
    said = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return (
        f"out of memory ({said}); this process held {peak:.1f} GiB on the host at its peak. Shorter lengths, fewer at "
        "a time, a smaller dtype, more ranks or a larger machine would help; `longctx VERB --help` has the settings"
    )


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(_help())
        return 0
    if words[0] == "--version":
        from longctx import __version__

        print(f"longctx {__version__}")
        return 0
    verb, rest = _find(words)
    if any(word in ("-h", "--help") for word in rest):
        print(_verb_help(verb))
        return 0
    from longctx.config.compose import split_options

    overrides, folders = split_options(rest)
    config = load(verb, overrides, folders)
    if (text := opening(verb.name, config)) and os.environ.get("RANK", "0") == "0":
        print(f"longctx: {text} ...", file=sys.stderr, flush=True)
    return int(_resolve(verb.run)(config) or 0)


def load(verb: Verb, overrides: Sequence[str], folders: Sequence[Path] = ()) -> Any:
    """The validated config of a verb: the schema's dataclass."""
    from longctx.config.base import build
    from longctx.config.compose import compose

    values = compose(verb.root, overrides, folders)
    return build(_resolve(verb.schema), values, origin=f"configs/{verb.root}.yaml and the command line")


def _find(words: list[str]) -> tuple[Verb, list[str]]:
    two = " ".join(words[:2])
    if two in VERBS:
        return VERBS[two], words[2:]
    if words[0] in VERBS:
        return VERBS[words[0]], words[1:]
    family = sorted(name for name in VERBS if name.startswith(words[0] + " "))
    if family:
        subverbs = [name.split()[1] for name in family]
        near = nearest(words[1], subverbs) if len(words) > 1 else None
        hint = f"; did you mean {near!r}?" if near else ""
        raise UserError(f"{two!r} is not a verb; {words[0]} has {', '.join(subverbs)}{hint}")
    near = nearest(words[0], {name.split()[0] for name in VERBS})
    hint = f"did you mean {near!r}? " if near else ""
    raise UserError(f"{words[0]!r} is not a verb; {hint}`longctx --help` lists them")


def _resolve(target: str) -> Any:
    module, name = target.split(":")
    return getattr(import_module(module), name)


def _help() -> str:
    width = max(len(name) for name in VERBS)
    lines = ["usage: longctx VERB [SUBVERB] [group=choice] [key=value] ... [--config-dir FOLDER]", ""]
    lines += [f"  {name:<{width}}  {VERBS[name].help}" for name in VERBS]
    lines += [
        "",
        "`longctx VERB --help` shows what can be set. Start with: longctx train experiment=quickstart",
    ]
    return "\n".join(lines)


def _verb_help(verb: Verb) -> str:
    from longctx.config.compose import config_dir, groups, groups_of

    root = (config_dir() / f"{verb.root}.yaml").read_text()
    used = groups_of(verb.root)
    lines = [f"longctx {verb.name}: {verb.help}", ""]
    shown = {name: choices for name, choices in groups().items() if name in used}
    if shown:
        lines += ["Groups (choose with group=choice):"]
        lines += [f"  {name:<12} {', '.join(choices)}" for name, choices in shown.items()] + [""]
    lines += [
        f"Settings and their defaults (configs/{verb.root}.yaml); override any as key=value:",
        "",
        root.rstrip(),
    ]
    lines += [
        "",
        "Nested keys take dots: curriculum.stages.s2048.tokens=1e6; '~curriculum.stages.s2048' drops a stage.",
        "Lists need quotes: 'key=[a,b]'. --config-dir FOLDER adds your own group files.",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
