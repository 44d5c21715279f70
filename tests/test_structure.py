"""Rules of the tree that no linter checks: names, import cycles, sizes, docstrings, the public names."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import longctx

ROOT = Path(longctx.__file__).parent
FILES = {
    ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(ROOT.rglob("*.py"))
}
SENTENCE_END = (".", "!", "?", ":", "::", '"', ")")


@cache
def trees() -> dict[str, ast.Module]:
    """Every module's syntax tree; read by the one worker that runs this file."""
    return {module: ast.parse(path.read_text()) for module, path in FILES.items()}


def definitions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node


def test_every_class_name_exists_once():
    found = defaultdict(list)
    for module, tree in trees().items():
        for node in definitions(tree):
            if isinstance(node, ast.ClassDef):
                found[node.name].append(module)
    assert {name: modules for name, modules in found.items() if len(modules) > 1} == {}


def test_no_file_is_past_400_lines_and_no_function_past_70():
    long = [f"{module}: {n}" for module, path in FILES.items() if (n := path.read_text().count("\n")) > 400]
    for module, tree in trees().items():
        for node in definitions(tree):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if not isinstance(node, ast.ClassDef) and lines > 70:
                long.append(f"{module}.{node.name}: {lines}")
    assert long == []


def test_docstrings_begin_with_a_whole_sentence():
    """The first line of a function's or class's docstring and the first paragraph of a module's end a sentence."""
    broken = []
    for module, tree in trees().items():
        text = ast.get_docstring(tree)
        if text is not None and not text.split("\n\n")[0].rstrip().endswith(SENTENCE_END):
            broken.append(module)
        for node in definitions(tree):
            text = ast.get_docstring(node)
            if text is not None and not text.splitlines()[0].rstrip().endswith(SENTENCE_END):
                broken.append(f"{module}.{node.name}: {text.splitlines()[0]}")
    assert broken == []


def test_every_public_name_has_a_docstring_with_units_and_an_example():
    """tests/test_library.py runs the examples."""
    for name in longctx.__all__:
        if name != "__version__":
            text = getattr(longctx, name).__doc__ or ""
            assert "\n    >>> import longctx" in text, f"{name} has no example"
            assert re.search(r"\[[A-Z, ]*[BSnV]\b|\btokens\b|\bseconds\b|\bbytes\b|\brank\b", text), (
                f"{name} names no shape or unit"
            )


def handed_on(package: str) -> dict[str, str]:
    """What a package's __init__ imports at its top: name -> the module that defines it."""
    found = {}
    for node in trees()[package].body:
        if isinstance(node, ast.ImportFrom) and node.module in FILES:
            found.update({alias.asname or alias.name: node.module for alias in node.names})
    return found


def target_of(module: str, name: str) -> str:
    """The module that `from module import name` needs: a submodule, or the one behind a package's __init__."""
    if f"{module}.{name}" in FILES:
        return f"{module}.{name}"
    if FILES[module].name == "__init__.py" and name in (names := handed_on(module)):
        return target_of(names[name], name)
    return module


def imports(tree: ast.AST) -> set[str]:
    """The modules of longctx that a module imports: at its top, inside functions, and by names in strings.

    Imports for type checkers alone do not run and are left out.
    """
    names: set[str] = set()
    hidden: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            hidden.update(inner for statement in node.body for inner in ast.walk(statement))
    for node in ast.walk(tree):
        if node in hidden:
            continue
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names if alias.name in FILES)
        elif isinstance(node, ast.ImportFrom) and node.module in FILES:
            names.update(target_of(node.module, alias.name) for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            names.update(text.value for text in node.args if isinstance(text, ast.Constant) and text.value in FILES)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):  # "longctx.train.train:run"
            names.update(name for name in re.findall(r"^(longctx(?:\.\w+)+):\w+$", node.value) if name in FILES)
    return names - {"longctx"}


def import_cycles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Strongly connected components of more than one module (Tarjan)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(module: str) -> None:
        index[module] = low[module] = len(index)
        stack.append(module)
        for target in sorted(graph[module]):
            if target not in index:
                visit(target)
                low[module] = min(low[module], low[target])
            elif target in stack:
                low[module] = min(low[module], index[target])
        if low[module] == index[module]:
            component = []
            while not component or component[-1] != module:
                component.append(stack.pop())
            if len(component) > 1:
                found.append(sorted(component))

    for module in graph:
        if module not in index:
            visit(module)
    return found


def test_no_imports_form_a_cycle():
    assert import_cycles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]
    # `import longctx` itself loads nothing: the package's names are resolved when they are used.
    graph = {module: imports(tree) - {module} for module, tree in trees().items() if module != "longctx"}
    assert import_cycles(graph) == []
