"""The Python standard library as a text corpus: code and prose that every machine with Python has.

Each file gives two documents: its source, and its docstrings as one page of documentation. Both have the file's name
as their group, so that the docstrings of held-out files are held out too. Test suites are left out, because only some
distributions ship them.
"""

from __future__ import annotations

import ast
import inspect
import os
import sysconfig
import warnings
from collections import deque
from collections.abc import Iterator
from pathlib import Path

from longctx.data.documents import Document, Location, Tally, Unit, read_text
from longctx.errors import UserError

_SKIPPED = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idle_test",
    "__pycache__",
    "lib2to3",
    "turtledemo",
}


def stdlib_files(root: Path | None = None) -> list[tuple[Path, str]]:
    """Return the library's .py files, sorted, each with its name relative to the library's folder.

    Skipped folders are not entered: site-packages may hold a hundred times the library's files.
    """
    base = Path(sysconfig.get_paths()["stdlib"]) if root is None else root
    found = []
    for folder, folders, files in os.walk(base):
        folders[:] = [name for name in folders if name not in _SKIPPED]
        found += [Path(folder, name) for name in files if name.endswith(".py")]
    if not found:
        raise UserError(
            f"{base} holds no .py files, so this Python's standard library cannot serve as text; use data=text "
            "data.path=FOLDER"
        )
    return [(path, path.relative_to(base).as_posix()) for path in sorted(found)]


def documents(unit: Unit, tally: Tally) -> Iterator[Document]:
    """Yield a file's source and, if there are any, its docstrings; with column `docs` only the docstrings."""
    source = read_text(Path(unit.path), unit.name, tally)
    if source is None:
        return
    if unit.column != "docs":
        yield Document(unit.name, unit.name, source, Location(unit.name))
    page = docstrings(source, unit.name)
    if page:
        tally.seen += unit.column != "docs"  # read_text has counted the file itself
        yield Document(unit.name + "#docs", unit.name, page, Location(unit.name + "#docs"))


def docstrings(source: str, name: str) -> str:
    """Return the docstrings of a module, its classes and functions as one page of text, which may be empty."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
    except (SyntaxError, ValueError):  # a file for another version of Python; its source still serves as text
        return ""
    parts = []
    for node in _statements(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node, clean=False)
            if text and text.strip():
                title = name if isinstance(node, ast.Module) else node.name
                parts.append(f"# {title}\n\n{inspect.cleandoc(text)}\n")
    return "\n".join(parts)


def _statements(tree: ast.Module) -> Iterator[ast.AST]:
    """Yield a module and its statements in the order of `ast.walk`, which would visit every expression as well."""
    waiting: deque[ast.AST] = deque([tree])
    while waiting:
        node = waiting.popleft()
        yield node
        for field in ("body", "handlers", "cases", "orelse", "finalbody"):  # in the order of each node's fields
            waiting.extend(getattr(node, field, ()))
