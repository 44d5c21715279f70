"""The pages' Python code runs, and the names and files that they mention exist."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from longctx.assets import tiny_model

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "configs").rglob("*.yaml"))]
FILES = {"longctx.json"}  # written as a module's name


def code_after(page: str, heading: str) -> str:
    """The first Python block below a heading."""
    _, _, text = (ROOT / page).read_text().partition(f"\n## {heading}\n")
    found = re.search(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    assert found is not None, (page, heading)
    return found[1]


def run(code: str, **names: Any) -> dict[str, Any]:
    exec(compile(code, "a page", "exec"), names)
    return names


@pytest.fixture(scope="module")
def text() -> str:
    return "def area(width, height):\n    return width * height\n" * 200


def test_the_data_page_reads_a_stage(tmp_path: Path, text: str):
    (tmp_path / "docs").mkdir()
    for number in range(20):
        (tmp_path / "docs" / f"{number}.txt").write_text(f"{number}\n{text}")
    code = code_after("docs/data.md", "Reading")
    for given, small in (
        ('"runs/x/data"', f'"{tmp_path}"'), ("65536", "1024"), ("1000", "8"), ("DOCS", f"{tmp_path}/docs"),
        ("MODEL", str(tiny_model())),
    ):  # fmt: skip
        assert given in code
        code = code.replace(given, small)
    found = run(code)
    stage = found["stage"]
    assert len(stage.local(7, found["positions"]).tokens) == 1024  # one rank has them all
    assert stage.sequence(7).tokens.shape == (1024,)
    assert {"padding", "cut", "epochs"} <= set(stage.stats())


def test_the_notebook_of_the_evaluation_page(tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    Path("book.txt").write_text(text)
    code = code_after("docs/eval.md", "In a notebook")
    assert '[4096, "32k"]' in code
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_model()), AutoTokenizer.from_pretrained(tiny_model())
    grid = run(code.replace('[4096, "32k"]', '[384, "1k"], per_cell=1'), model=model, tokenizer=tokenizer)["grid"]
    assert np.shape(grid.accuracies) == (5, 2)
    assert Path("needles.png").exists()


def test_the_attention_page_on_one_rank(tmp_path: Path):
    code = (
        code_after("docs/attention.md", "How to").replace("dist.init_process_group()", "").replace("nodes=2", "nodes=1")
    )
    q, kv = torch.randn(1, 4, 64, 16), torch.randn(1, 2, 64, 16)
    found = run(code, S=64, boundaries=[0, 40, 64], q=q, k_local=kv, v_local=kv)
    assert found["out"].shape == q.shape
    assert found["lse_local"].shape == (1, 4, 64)
    wants = (ROOT / "docs/attention.md").read_text().partition("| want | write |")[2].partition("\n\n")[0]
    for thing in ("cp", "layout"):
        for names in re.findall(rf"`{thing}\.([\w.]+)", wants):
            target = found[thing]
            for name in names.split("."):
                target = getattr(target, name)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_names_and_files_that_a_page_mentions_exist(page: Path):
    said = page.read_text()
    for name in sorted(set(re.findall(r"\blongctx(?:\.\w+)+", said)) - FILES):
        assert exists(name), name
    for block in re.findall(r"^```python\n(.*?)^```", said, re.DOTALL | re.MULTILINE):
        for line in re.findall(r"^(?:>>> )?((?:from|import) longctx[^#\n]*)", block, re.MULTILINE):
            run(line)
    for file in re.findall(r"(?<![\w/.])((?:longctx|tests|configs|launch)/[\w./*-]+\w)", said):
        assert "NAME" in file or list(ROOT.glob(file)) or file == "launch/mycluster.yaml", file


def exists(name: str) -> bool:
    """Whether a dotted name is a module, or something in one."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        try:
            target: Any = importlib.import_module(".".join(parts[:count]))
        except ImportError:
            continue
        for part in parts[count:]:
            target = getattr(target, part, None)
        return target is not None
    return False
