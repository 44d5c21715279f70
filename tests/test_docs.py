"""The documentation: links, anchors, commands and planned figures hold, and the reference is the schemas'."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from longctx import cli
from longctx.config import reference
from longctx.config.compose import load, schema_of
from longctx.config.help import keys
from longctx.config.words import Overrides, parse
from longctx.curriculum import resolve
from longctx.errors import UserError
from longctx.shape import shape_of_model
from longctx.train import checks
from longctx.verbs import VERBS

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
HOW_TO = [page for page in PAGES if page.parent.name == "how_to" and page.name != "index.md"]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
PLACEHOLDERS = {
    "VERB",
    "KEY=VALUE",
    "key=value",
    "--config-dir",
}  # words of a pattern, or of a folder that the reader makes


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def prose(page: Path) -> str:
    """A page without its code."""
    return re.sub(r"`[^`\n]+`", "", BLOCK.sub("", page.read_text()))


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ +(.+)$", BLOCK.sub("", page.read_text()), re.MULTILINE)
    plain = (re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower() for heading in headings)
    return {re.sub(r"[^\w\- ]", "", heading).replace(" ", "-") for heading in plain}


def links(page: Path) -> list[str]:
    found = re.findall(r"\]\(([^)\s]+)\)", prose(page))
    return [link for link in found if not re.match(r"[a-z]+:", link)]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_relative_link_and_anchor_resolves(page):
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{name_of(page)}: {link}"
        assert page.name == "README.md" or target.is_relative_to(DOCS), f"{name_of(page)}: {link} leaves docs/"
        # mkdocs joins two hyphens where GitHub keeps them, so that such an anchor works in one of them only
        assert not anchor or (anchor in anchors(target) and "--" not in anchor), f"{name_of(page)}: {link}"


def commands(page: Path) -> Iterator[list[str]]:
    """The longctx commands in a page's code blocks, as the words after `longctx`."""
    for kind, block in BLOCK.findall(page.read_text()):
        if kind not in ("", "bash", "text"):
            continue
        for line in block.replace("\\\n", " ").splitlines():
            if "longctx" not in line or "=" not in line or "source <(" in line:
                continue
            words = [word for word in shlex.split(line.split("   (")[0], comments=True) if word != "..."]
            while words and ("=" in words[0] or words[0] == "sudo"):
                words = words[1:]
            if words[:1] == ["longctx"]:
                yield words[1:]
            elif "longctx" in words:
                yield words[words.index("longctx") + 1 :]
            else:
                for start in {"longctx.run", "launch/torchrun.sh", "launch/slurm.sbatch"} & set(words):
                    given = words[words.index(start) + 1 :]
                    yield given if given[:1] == ["preflight"] else ["train", *given]


WRITTEN = [page for page in reversed(PAGES) if page.parent != reference.FOLDER]
COMMANDS = {tuple(words): name_of(page) for page in WRITTEN for words in commands(page)}


def test_the_pages_have_commands():
    assert len(COMMANDS) > 55
    assert {words[0].split()[0] for words in COMMANDS} >= {"train", "plan", "theta", "eval", "lora", "data", "bench"}


@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: f"{COMMANDS[words]}: {' '.join(words)[:60]}")
def test_a_command_of_the_documentation_composes(words):
    """Its verb, keys, choices and values are valid by the schemas; the command is not run."""
    if PLACEHOLDERS & set(words):
        pytest.skip("a pattern with placeholders")
    if "--help" in words:
        assert cli.main(words) == 0
        return
    verb, rest = cli._find(list(words))
    line = parse(rest)
    if not line.multirun:
        load(verb, line.overrides)
        return
    swept = list(Overrides(verb.root, schema_of(verb.root)).expand(line.overrides))
    fixed = [word for word in line.overrides if word.partition("=")[0] not in swept[0]]
    for values in swept:
        load(verb, [*fixed, *(f"{key}={value}" for key, value in values.items())])


def mentioned(page: Path) -> Iterator[list[str]]:
    """The longctx commands in a page's sentences and tables, and in the reference's blocks."""
    if page.parent == reference.FOLDER:
        yield from (words for words in commands(page) if not PLACEHOLDERS & set(words) and "-m" not in words)
    for command in re.findall(r"`longctx ([^`]+)`", BLOCK.sub("", page.read_text())):
        words = [word for word in shlex.split(command) if word != "..."]
        if not PLACEHOLDERS & set(words) and words[0] != "completion" and "-m" not in words:
            yield words


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_a_command_that_a_page_mentions_has_known_keys(page):
    for words in mentioned(page):
        verb, rest = cli._find(words) if not words[0].startswith("--") else (VERBS["train"], words)
        known = Overrides(verb.root, schema_of(verb.root))
        for word in parse(rest).overrides:
            assert known.checked(word)


@pytest.mark.parametrize("page", HOW_TO, ids=name_of)
def test_a_how_to_page_says_what_it_needs_and_fits_one_screen(page):
    lines = page.read_text().splitlines()
    assert lines[2].startswith("**Needs:** ")
    assert len(lines) <= 60
    assert "```" in page.read_text()


def tables(page: Path) -> Iterator[list[dict[str, str]]]:
    """The tables of a page as rows {column: cell}."""
    for lines in re.findall(r"(?:^\|.*\|\n)+", page.read_text(), re.MULTILINE):
        header, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines.splitlines()]
        yield [dict(zip(header, row, strict=True)) for row in rows]


def estimates() -> dict[str, set[tuple[str, str]]]:
    """The tables of planned figures: words of the command -> {(column, cell)}."""
    found: dict[str, set[tuple[str, str]]] = {}
    for row in (row for page in HOW_TO for table in tables(page) for row in table if "planned as" in row):
        words, *_ = re.findall(r"`([^`]+)`", row["planned as"])
        found.setdefault(words, set()).update((column, row[column]) for column in row if column != "planned as")
    return found


def test_there_are_planned_figures():
    assert len(estimates()) >= 10


@pytest.mark.parametrize("words", estimates())
def test_a_planned_figure_is_what_plan_says(words, capsys):
    assert cli.main(["plan", *words.split(), "format=json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert all(stage["fits"] for stage in planned["stages"].values())
    figures = {
        "hours": planned["hours"],
        "device-hours": planned["device_hours"],
        "tokens trained": sum(stage["tokens"] for stage in planned["stages"].values()),
    }
    for column, stated in estimates()[words]:
        if column == "GPU":
            assert stated == planned["hardware"]["name"]
        else:
            unit = {"M": 1e6, "B": 1e9}.get(stated[-1], 1)
            assert float(stated.rstrip("MB")) * unit == pytest.approx(figures[column], rel=0.006)


CURRICULA = {
    row["curriculum"].strip("`"): [float(millions) * 1e6 for millions in row["tokens trained, millions"].split(", ")]
    for table in tables(DOCS / "curriculum.md")
    for row in table
    if "curriculum" in row
}


def test_the_table_has_every_curriculum():
    assert set(CURRICULA) == {file.stem for file in (ROOT / "configs/curriculum").glob("*.yaml")}


@pytest.mark.parametrize("name", CURRICULA)
def test_the_tokens_of_a_curriculum_are_those_of_its_stages(name):
    """As `plan` shows them; they do not depend on the model."""
    curriculum = load(VERBS["theta"], [f"curriculum={name}"]).curriculum
    stages = resolve(
        curriculum, head_dim=128, rope={"rope_type": "default", "rope_theta": 10000.0}, window=512, file=name
    )
    assert CURRICULA[name] == pytest.approx([stage.tokens for stage in stages], rel=0.006)


@pytest.mark.parametrize(
    ("model", "words", "short"),
    [
        ("Qwen/Qwen3-8B", ["curriculum=8k_to_1048k", "curriculum.only=[s64k,s128k,s256k,s512k,s1048k]"], []),
        ("Qwen/Qwen3-8B", ["curriculum=qwen3_1m"], []),
        ("meta-llama/Llama-3.1-8B-Instruct",
         ["curriculum=8k_to_1048k", "curriculum.only=[s256k,s512k,s1048k]"], ["209,055 of 262,144"]),
        ("meta-llama/Llama-3.1-8B-Instruct",
         ["curriculum=ultralong", "rope=yarn", "rope.beta_fast=4"], ["650,885 of 1M"]),
        ("Qwen/Qwen3-8B", ["curriculum=qwen3_1m", "curriculum.only=[s1M]", "rope=scaling-law"], ["504,662 of 1M"]),
        ("mistralai/Mistral-7B-v0.3",
         ["curriculum=8k_to_1048k", "curriculum.only=[s64k,s128k,s256k,s512k,s1048k]"], []),
    ],
)  # fmt: skip
def test_the_supported_lengths_of_long_windows_are_what_theta_says(model, words, short, capsys):
    """`short`: the stages whose theta does not support their length, as the page names them."""
    words = [f"model.path={ROOT}/longctx/assets/configs/{model}", "rope=dynamic-ntk", *words, "format=json"]
    assert cli.main(["theta", *words]) == 0
    stages = json.loads(capsys.readouterr().out)["stages"]
    page = (DOCS / "how_to/your_model.md").read_text()
    assert all(text in page for text in short)
    names = {2**20: "1M"}
    assert short == [
        f"{stage['supported_length']:,} of {names.get(stage['seq_len'], format(stage['seq_len'], ','))}"
        for stage in stages
        if stage["supported_length"] is not None and stage["supported_length"] <= stage["seq_len"]
    ]


def test_the_install_page_has_the_lowest_versions_of_what_a_gpu_machine_takes():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    page = (DOCS / "how_to/install.md").read_text()
    extras = project["optional-dependencies"]
    named = [word for word in project["dependencies"] if word.split(">")[0] in ("torch", "transformers")]
    assert [word for word in (*named, *extras["train"], *extras["gpu"]) if f"`{word}`" not in page] == []


def test_the_disk_that_the_page_of_eight_gpus_names_is_what_training_asks_for(monkeypatch):
    config = load(VERBS["train"], ["experiment=llama3_8b_262k_8gpu", "model.dtype=bfloat16"])
    file = ROOT / "longctx/assets/configs/meta-llama/Meta-Llama-3-8B-Instruct"
    shape = shape_of_model(replace(config.model, path=str(file)))
    stages = [SimpleNamespace(name=name) for name in config.curriculum.only]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
    page = (DOCS / "how_to/eight_gpus.md").read_text()
    for keep, stated in ((2, "299 GiB of disk"), (1, "210 with `checkpoint.keep=1`")):
        changed = replace(config, checkpoint=replace(config.checkpoint, keep=keep))
        with pytest.raises(UserError) as refused:
            checks.check_disk(changed, stages, shape, source_bytes=0)
        (asked,) = re.findall(r"needs about ([\d.]+) GiB", str(refused.value))
        assert stated in page
        assert f"{float(asked):.0f}" in stated


keys_of = cache(keys)


def test_the_reference_is_what_the_schemas_say(monkeypatch):
    """`python -m longctx.config.reference` writes it."""
    monkeypatch.setattr(reference, "keys", keys_of)
    wanted = reference.pages()
    assert {file.name for file in reference.FOLDER.iterdir()} == set(wanted)
    assert {f"{verb.root}.md" for verb in VERBS.values()} == set(wanted) - {"index.md"}
    stale = [name for name, text in wanted.items() if (reference.FOLDER / name).read_text() != text]
    assert stale == []


@pytest.mark.parametrize("name", sorted(VERBS))
def test_a_reference_page_has_every_key_with_its_default(name):
    text = (reference.FOLDER / f"{VERBS[name].root}.md").read_text()
    for key, _, default, _ in keys_of(VERBS[name]):
        (row,) = re.findall(rf"^\| `{re.escape(key)}` \|.*$", text, re.MULTILINE)
        assert default == "" or default.replace(str(ROOT), "PACKAGE") in row


def test_the_navigation_lists_every_page():
    def leaves(entry: Any) -> Iterator[str]:
        for child in entry.values() if isinstance(entry, dict) else entry:
            yield from [child] if isinstance(child, str) else leaves(child)

    listed = list(leaves(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]))
    assert len(listed) == len(set(listed))
    assert set(listed) == {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")}


DRAWN = {
    "ring_1x4_forward.svg": "nodes=1 ranks=4 draw.schedule=flat_ring draw.seq_len=64k",
    "flat_ring_2x4_forward.svg": "nodes=2 ranks=4 draw.schedule=flat_ring draw.seq_len=32k hardware.outer_gbytes=2",
    "double_ring_2x4_forward.svg": "nodes=2 ranks=4 draw.schedule=double_ring draw.seq_len=32k hardware.outer_gbytes=2",
}


@pytest.mark.parametrize("name", DRAWN)
def test_a_picture_is_the_schedule_that_runs(name, tmp_path, capsys):
    words = ["plan", "show=schedule", "draw.direction=forward", *DRAWN[name].split(), f"draw.svg={tmp_path / name}"]
    assert cli.main(words) == 0
    assert (tmp_path / name).read_text() == (DOCS / "img" / name).read_text()


def test_pictures_are_small():
    assert [file.name for file in DOCS.rglob("*.svg") if file.stat().st_size > 60_000] == []


# What newcomers ask first, the page that answers, and words that its answer has.
QUESTIONS = {
    "install on a GPU machine": ("how_to/install.md", "longctx doctor"),
    "a window that is long already": ("how_to/your_model.md", "## A window above 8,192"),
    "which schedule on 4 nodes of 8": ("how_to/slow_network.md", "parallel.schedule=auto"),
    "8 GPUs of one machine": ("how_to/eight_gpus.md", "experiment=llama3_8b_262k_8gpu"),
    "FSDP": ("how_to/fsdp.md", "engine=deepspeed engine.zero=3"),
    "flash-attention": ("how_to/flash_attention.md", "longctx doctor"),
    "continue on another cluster": ("how_to/resume_elsewhere.md", "run_dir="),
    "cost of 8B to 262k": ("how_to/cost.md", "device-hours"),
    "wandb": ("how_to/dashboards.md", "wandb sync"),
    "RULER": ("how_to/evaluate.md", "RULER's own 13 tasks"),
    "vLLM": ("how_to/serve_vllm.md", "vllm serve"),
    "a new family": ("how_to/new_family.md", "architectures.py"),
}


@pytest.mark.parametrize("question", QUESTIONS)
def test_a_newcomers_question_is_answered_within_two_clicks_from_the_readme(question):
    page, answer = QUESTIONS[question]
    once = reached(PAGES[0])
    assert DOCS / page in once.union(*(reached(found) for found in once))
    assert answer in (DOCS / page).read_text()


def reached(page: Path) -> set[Path]:
    """The pages that a link of this page leads to."""
    targets = {(page.parent / link.partition("#")[0]).resolve() for link in links(page)}
    return {target for target in targets if target.suffix == ".md" and target.is_file()}


def test_mkdocs_builds_the_pages_without_a_warning(tmp_path):
    if not (ROOT / "build/docs/mkdocs").is_dir():
        pytest.skip("mkdocs is not installed; launch/docs.sh installs it into build/docs")
    command = ["bash", "launch/docs.sh", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    pages = "".join(page.read_text() for page in tmp_path.rglob("*.html"))
    loaded = re.findall(r'<(?:script|img|link)\b[^>]*\b(?:src|href)="(?:https?:)?//[^"]+"', pages)
    assert [tag for tag in loaded if 'rel="canonical"' not in tag] == []
