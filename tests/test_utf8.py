"""Paths, documents and output beyond ASCII where the locale is C and Python's UTF-8 mode is off."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.test_structure import FILES, trees

C_LOCALE = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": ""}


def run(module: str, *words: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    command = [os.fsencode(word) for word in (sys.executable, "-m", module, *words)]
    return subprocess.run(command, capture_output=True, timeout=120, env={**os.environ, **environment})


def text_calls(tree: ast.AST) -> Iterator[ast.Call]:
    """The calls that read or write text and leave its encoding to the locale."""
    for call in ast.walk(tree):
        if not isinstance(call, ast.Call):
            continue
        name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
        given = {keyword.arg: keyword.value for keyword in call.keywords}
        if "encoding" in given:
            continue
        modes = [part.value for part in [*call.args[:2], *given.values()] if isinstance(part, ast.Constant)]
        binary = any(isinstance(mode, str) and "b" in mode and len(mode) <= 3 for mode in modes)
        opens = name in ("open", "fdopen") and not ast.unparse(call.func).startswith(("os.open", "tarfile", "Recorder"))
        child = name in ("run", "Popen", "check_output") and given.keys() & {"text", "universal_newlines"}
        whole = (name == "read_text" and not call.args) or (name == "write_text" and len(call.args) == 1)
        if child or whole or (opens and not binary) or (name == "NamedTemporaryFile" and "mode" in given):
            yield call


def test_every_file_and_every_pipe_of_text_names_its_encoding():
    bare = "path.read_text(); path.write_text(a); open(path); path.open('a'); os.fdopen(1, 'w'); run(a, text=True)"
    assert len(list(text_calls(ast.parse(bare)))) == 6
    assert not list(text_calls(ast.parse("open(path, 'rb'); path.read_text('utf-8'); path.open('wb')")))
    found = [f"{FILES[module]}:{call.lineno}" for module, tree in trees().items() for call in text_calls(tree)]
    assert found == []


def test_a_verb_reads_and_writes_beyond_ascii_in_the_c_locale(tmp_path: Path):
    """Documents are tokenized by worker processes, which inherit the mode."""
    documents, cache = tmp_path / "té_漢.jsonl", tmp_path / "cäche"
    lines = [json.dumps({"text": f"Ünï → {number} 漢字 × " * 40}, ensure_ascii=False) for number in range(40)]
    documents.write_text("\n".join(lines) + "\n", encoding="utf-8")
    done = run("longctx", "data", "model=tiny", "data=text", f"data.path={documents}", f"cache={cache}", **C_LOCALE)
    assert done.returncode == 0, done.stderr.decode()
    assert f"shards in {cache}".encode() in done.stdout + done.stderr
    assert any(cache.rglob("meta.json"))


def test_a_launched_rank_names_such_a_path_in_the_c_locale(tmp_path: Path):
    done = run("longctx.run", f"model.path={tmp_path}/é", "curriculum=tiny_16x", "data=tiny", **C_LOCALE)
    assert (done.returncode, b"Traceback" in done.stderr) == (2, False)
    assert f"model.path={tmp_path}/é".encode() in done.stderr


@pytest.mark.parametrize("screen", ["ascii", "latin-1"])
def test_a_screen_replaces_what_it_cannot_show(screen: str):
    done = run("longctx", "train", "model=tiny", "data=tiny", "curriculum=tiny_16x", "name=→ü", "--cfg",
               PYTHONIOENCODING=screen)  # fmt: skip
    assert (done.returncode, done.stderr) == (0, b"")
    assert "name: →ü\n".encode(screen, "backslashreplace") in done.stdout


def test_a_word_that_is_not_utf8_is_refused():
    done = run("longctx", "train", "model=tiny", "name=\udcff")
    assert (done.returncode, b"Traceback" in done.stderr) == (2, False)
    assert b"are not UTF-8" in done.stderr
