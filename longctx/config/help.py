"""What `--help` and `--cfg` show: the keys of a verb with their types, defaults and docs, drawn from the schemas.

A key's doc is the `#:` comment on its field, or on the lines above it, as Sphinx reads them.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import shutil
import textwrap
from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin, get_type_hints

from longctx.config.base import adapter_of, parse_count, parse_length
from longctx.config.compose import compose, resolve
from longctx.config.groups import choice_file, config_dir, defaults_of, groups, header
from longctx.config.keys import alias, known_keys, members, step_into, unknown_key_message, variants
from longctx.config.words import CommandLine
from longctx.verbs import Verb

Row = tuple[str, str, str, str]


def as_yaml(config: Any) -> str:
    """A validated config as YAML that the same verb reads again."""
    import yaml

    return yaml.safe_dump(as_dict(config), sort_keys=False, allow_unicode=True)


def as_dict(config: Any) -> dict[str, Any]:
    """A validated config as plain values, every key with its value."""
    return adapter_of(type(config)).dump_python(config, mode="json", by_alias=True)


def verb_help(verb: Verb, line: CommandLine) -> str:
    """The help of a verb, or of the sections and groups that `line.topics` names."""
    kind = resolve(verb.schema)
    values = compose(verb.root, line.overrides, line.folders)
    offered, chosen = groups(line.folders), defaults_of(verb.root)
    names = {option.partition("@")[0]: option for option in chosen}
    own = [name for name in offered if any((folder / name).is_dir() for folder in line.folders)]
    topics = [topic.rstrip(".") for topic in line.topics]
    if not _has(kind, ["rope"]) and _has(kind, ["curriculum", "rule"]):  # rope=yarn is curriculum.rule=yarn
        topics = ["curriculum.rule" if topic == "rope" else topic for topic in topics]
    for topic in topics:
        if topic not in names and topic not in own and not _has(kind, topic.split(".")):
            raise _no_topic(topic, [*known_keys(kind), *names], verb)
    if topics:
        return "\n\n".join("\n".join(_topic(kind, values, topic, offered, line)) for topic in topics)
    lines = [f"longctx {verb.name}: {verb.help}", "", *_more_about(verb)]
    shown = {option: offered[name] for name, option in names.items()} | {name: offered[name] for name in own}
    if shown:
        lines += ["", "Groups (group=choice; the choice in brackets is taken when none is named):"]
        width = max(map(len, shown))
        lines += [
            f"  {option:<{width}}  " + ", ".join(f"[{c}]" if c == chosen.get(option) else c for c in choices)
            for option, choices in shown.items()
        ]
    lines += ["", "Keys (key=value), their types and defaults:", *_rows(_keys(kind, values, "", depth=1))]
    lines += [
        "",
        f"`longctx {verb.name} --help SECTION` shows the keys of a section or the choices of a group.",
        "'~section.key' drops a key. Lists need quotes: 'key=[a,b]'. Lengths: 64k is 65,536; counts: 100M is 1e8.",
    ]
    return "\n".join(lines)


def _more_about(verb: Verb) -> list[str]:
    """The header of a verb's file, without its first line where that is a whole sentence: verb.help replaces it."""
    first, *rest = header(config_dir() / f"{verb.root}.yaml") or [""]
    if not rest or not rest[0][:1].islower():
        return rest
    first = first.removeprefix(f"longctx {verb.name}: ")
    return [first[:1].upper() + first[1:], *rest]


def keys(verb: Verb) -> list[Row]:
    """Return (key, type, default, doc) of every key of a verb, with the defaults that its root file gives."""
    return list(_keys(resolve(verb.schema), compose(verb.root, ()), "", depth=9))


def section_doc(verb: Verb, section: str) -> str:
    """Return what the schemas say of a section of a verb, or the empty text."""
    schema = resolve(verb.schema)
    name = next(field.name for field in dataclasses.fields(schema) if alias(field) == section)
    return field_docs(schema).get(name) or _about(step_into(schema, section))


def _topic(kind: Any, values: Any, topic: str, offered: dict[str, list[str]], line: CommandLine) -> list[str]:
    """A group's choices, and the keys below a section."""
    lines = []
    if topic in offered:
        lines += [f"{topic}=CHOICE:"]
        for choice in offered[topic]:
            file = choice_file(topic, choice, line.folders)
            about = header(file)[:1] if file is not None else []
            lines += _rows([(choice, "", "", about[0] if about else "")])
    path = topic.split(".")
    if _has(kind, path):
        above: tuple[Any, Any, str] = (kind, values, "")
        for part in path:
            above, kind = (kind, values, topic.rpartition(".")[0]), step_into(kind, part)
            values = values.get(part) if isinstance(values, dict) else None
        own = [row for row in _keys(*above, depth=1) if row[0] == topic]
        rows = list(_keys(kind, values, topic, depth=9)) or own
        about = own[0][3] if variants(kind) and own else _about(kind)  # not the first variant's
        lines += [f"{topic}: {about}".rstrip(": ")] * (rows[0][0] != topic) + _rows(rows)
    return lines


def _has(kind: Any, path: list[str]) -> bool:
    for part in path:
        kind = step_into(kind, part)
    return kind is not None


def _no_topic(topic: str, known: list[str], verb: Verb) -> Exception:
    from longctx.errors import UserError

    return UserError(f"{unknown_key_message(topic, known)} (`longctx {verb.name} --help` lists them)")


def _keys(kind: Any, values: Any, path: str, depth: int) -> Iterator[Row]:
    """(key, type, default, doc) of every key below `kind`. values: what the verb's files set there."""
    for rule in variants(kind):
        given = [f"{f.name}: {_shown(_default(f))}" for f in dataclasses.fields(rule) if f.name != "name"]
        yield f"{path}={rule.name}", f"{{{', '.join(given)}}}", "", _about(rule)
    for member in () if variants(kind) else members(kind):
        if get_origin(member) is dict:
            yield from _keys(get_args(member)[1], None, f"{path}.NAME", depth)
        elif dataclasses.is_dataclass(member):
            yield from _fields(member, values if isinstance(values, dict) else {}, path, depth)


def _fields(section: Any, values: dict[str, Any], path: str, depth: int) -> Iterator[Row]:
    hints, docs = get_type_hints(section, include_extras=True), field_docs(section)
    for field in dataclasses.fields(section):
        key, kind = alias(field), hints[field.name]
        where = f"{path}.{key}" if path else key
        if _nested(kind) and not variants(kind):
            if depth > 1:
                yield from _keys(kind, values.get(key), where, depth - 1)
            else:
                yield where, "section", "", docs.get(field.name) or _about(kind)
            continue
        default = values[key] if key in values else _default(field)
        yield where, type_text(kind), _shown(default), docs.get(field.name, "")
        if variants(kind) and depth > 1 and not path.startswith("curriculum.stages"):
            yield from _keys(kind, {}, where, depth - 1)


def _nested(kind: Any) -> bool:
    """Whether a key of this type has keys of its own: those of a section, or of sections by name."""
    return any(
        dataclasses.is_dataclass(member) or (get_origin(member) is dict and _nested(get_args(member)[1]))
        for member in members(kind)
    )


def _default(field: dataclasses.Field[Any]) -> Any:
    default: Any = getattr(field.default, "default", field.default)
    factory: Any = getattr(field.default, "default_factory", None) or field.default_factory
    if factory is not dataclasses.MISSING and callable(factory):
        return factory()
    return "???" if default is dataclasses.MISSING or "Undefined" in repr(default) else default


def _shown(value: Any) -> str:
    if value == "???":
        return "(required)"
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_shown(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_shown(item) for item in value) + "]"
    return str(value) if value != "" else "''"


def type_text(kind: Any) -> str:
    """A type in the words of the command line."""
    read_by = {getattr(item, "func", None) for item in getattr(kind, "__metadata__", ())}
    for reader, name in ((parse_length, "length"), (parse_count, "count")):
        if reader in read_by:
            return name
    if variants(kind):
        return "rule"
    if get_origin(kind) is Literal:
        return "|".join(map(str, get_args(kind)))
    if get_origin(kind) in (list, tuple):
        return f"[{type_text(get_args(kind)[0])}]"
    if get_origin(kind) is dict:
        return f"{{name: {type_text(get_args(kind)[1])}}}"
    if dataclasses.is_dataclass(kind):
        return "section"
    if get_args(kind):
        arguments = get_args(kind)[:1] if hasattr(kind, "__metadata__") else get_args(kind)
        return "|".join(dict.fromkeys(type_text(part) for part in arguments if part is not type(None)))
    return {"str": "text", "int": "int", "float": "number", "bool": "true|false"}.get(
        getattr(kind, "__name__", ""), str(kind)
    )


def _about(kind: Any) -> str:
    """The first paragraph of a section's docstring."""
    sections = [member for member in members(kind) if dataclasses.is_dataclass(member)]
    inside = [get_args(member)[1] for member in members(kind) if get_origin(member) is dict]
    found = sections or [member for one in inside for member in members(one)]
    doc = inspect.getdoc(found[0]) if found and dataclasses.is_dataclass(found[0]) else ""
    return " ".join((doc or "").partition("\n\n")[0].split())


def field_docs(section: Any) -> dict[str, str]:
    """The `#:` comments of a dataclass's fields, those of the classes it builds on included."""
    docs: dict[str, str] = {}
    for cls in reversed(inspect.getmro(section)):
        if not dataclasses.is_dataclass(cls):
            continue
        source = textwrap.dedent(inspect.getsource(cls)).splitlines()
        for node in ast.parse("\n".join(source)).body[0].body:  # type: ignore[attr-defined]
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                above = node.lineno - 1
                while above and source[above - 1].lstrip().startswith("#:"):
                    above -= 1
                texts = [source[i].partition("#:")[2].strip() for i in range(above, node.end_lineno or above)]
                docs[node.target.id] = " ".join(text for text in texts if text)
    return docs


def _rows(rows: Any) -> list[str]:
    """Keys in columns, their docs folded to the terminal's width."""
    rows = list(rows)
    left = [f"  {key}" + (f" ({kind})" if kind else "") + (f" = {default}" if default else "")
            for key, kind, default, _ in rows]  # fmt: skip
    column = min(46, max(map(len, left), default=0) + 2)
    width = max(40, min(140, shutil.get_terminal_size((120, 24)).columns) - column)
    lines = []
    for text, (_, _, _, doc) in zip(left, rows, strict=True):
        folded = textwrap.wrap(doc, width) or [""]
        if len(text) + 2 > column and doc:
            lines.append(text)
            text = ""
        lines.append(f"{text:<{column}}{folded[0]}".rstrip())
        lines += [" " * column + part for part in folded[1:]]
    return lines
