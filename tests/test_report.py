"""The report page: every figure is the one in the run's files, pictures are inside, names are escaped."""

from __future__ import annotations

import base64
import errno
import json
import os
import shutil
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest

from longctx.config.report import ReportConfig
from longctx.errors import UserError
from longctx.report.page import finished_stages, run, write_page


class Page(HTMLParser):
    """tables[heading]: rows of cells; images[alt]: bytes; texts: everything else, by the tag it stands in."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}
        self.images: dict[str, bytes] = {}
        self.texts: dict[str, str] = {}
        self.tags: set[str] = set()
        self.inside: list[str] = [""]
        self.heading = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        values = dict(attrs)
        if tag not in ("img", "meta"):
            self.inside.append(tag)
        if tag == "table":
            self.tables[self.heading] = []
        elif tag == "tr":
            self.tables[self.heading].append([])
        elif tag in ("td", "th"):
            self.tables[self.heading][-1].append("")
        elif tag == "img":
            kind, _, data = str(values["src"]).partition(",")
            assert kind == "data:image/png;base64"
            self.images[str(values["alt"])] = base64.b64decode(data, validate=True)

    def handle_endtag(self, tag: str) -> None:
        assert self.inside.pop() == tag

    def handle_data(self, data: str) -> None:
        tag = self.inside[-1]
        if tag == "h2":
            self.heading = data
        if tag in ("td", "th"):
            self.tables[self.heading][-1][-1] += data
        self.texts[tag] = self.texts.get(tag, "") + data


def test_the_page_of_a_run_holds_the_figures_of_its_files(quickstart):
    page = Page(write_page(quickstart.folder))
    summary = json.loads((quickstart.folder / "summary.json").read_text())
    needles = {row[0]: row[1:] for row in page.tables["Needles found"][1:]}
    lengths = [f"{int(length):,}" for length in summary["needle"]["base"]]
    assert page.tables["Needles found"][0] == ["model", *lengths, "pooled"]
    assert needles == {
        name: [f"{100 * value:.1f} %" for value in (*found.values(), summary["needle_pooled"][name])]
        for name, found in summary["needle"].items()
    }
    losses = {row[0]: row[1:] for row in page.tables["Loss on held-out text"][1:]}
    assert losses == {name: [f"{value:.4f}" for value in found.values()] for name, found in summary["loss"].items()}
    assert page.images["needle grids"] == (quickstart.folder / "eval" / "needle.png").read_bytes()
    assert page.images["training loss"][:4] == b"\x89PNG"
    lines = [json.loads(line) for line in (quickstart.folder / "metrics.jsonl").read_text().splitlines()]
    for row, name in zip(page.tables["Stages"][1:], ("s2048", "s8192"), strict=True):
        mark = json.loads((quickstart.folder / "stages" / name / "finished.json").read_text())
        own = [line["loss"] for line in lines if line.get("stage") == name and line.get("loss") is not None]
        assert len(own) == mark["steps"]
        figures = [f"{summary['seq_len'][name]:,}", f"{summary['theta'][name]:,}", f"{summary['tokens'][name]:,}"]
        measured = [f"{own[-1]:.4f}", f"{mark['heldout_loss']:.4f}", f"{mark['seconds']:.0f}"]
        taken = next(line for line in reversed(lines) if line.get("stage") == name and "rings" in line)
        assert row == [name, *figures, str(mark["steps"]), *measured, "1 x 2", taken["rings"]]
    assert f"rank {summary['adapter']['rank']}, {summary['adapter']['bytes'] / 1e6:.2f} MB" in page.texts["p"]
    assert page.texts["pre"] == (quickstart.folder / "config.yaml").read_text()
    assert "http" not in (quickstart.folder / "report.html").read_text().replace(page.texts["pre"], "")


def made_run(folder: Path, stage: str = "s64", losses: tuple[float, ...] = (6.0, 5.5), **files: Any) -> Path:
    """What training leaves of a run of one stage without evidence, and other files by name."""
    (folder / "stages" / "one").mkdir(parents=True)
    mark = {"stage": stage, "seq_len": 64, "theta": 10000, "tokens": 512, "steps": len(losses), "seconds": 1.25}
    (folder / "stages" / "one" / "finished.json").write_text(json.dumps({**mark, "heldout_loss": None}))
    steps = [json.dumps({"stage": stage, "tokens": 256 * (i + 1), "loss": loss}) for i, loss in enumerate(losses)]
    (folder / "metrics.jsonl").write_text("".join(line + "\n" for line in steps))
    (folder / "config.yaml").write_text("name: <made>\n")
    for name, values in files.items():
        (folder / f"{name}.json").write_text(json.dumps(values))
    return folder


def test_a_run_without_evidence_shows_its_stages_and_its_loss(tmp_path: Path):
    page = Page(write_page(made_run(tmp_path / "run")))
    assert list(page.tables) == ["Stages"]
    assert page.tables["Stages"][1] == ["s64", "64", "10,000", "512", "2", "5.5000", "", "1", "", ""]
    assert list(page.images) == ["training loss"]


def test_a_stage_of_one_step_is_a_point_in_the_curve(tmp_path: Path):
    """Its colour, the first of matplotlib's, is in the axes as well as in the legend."""
    from matplotlib.image import imread

    def coloured(*losses: float) -> int:
        folder = made_run(tmp_path / f"run{len(losses)}", losses=losses)
        picture = imread(BytesIO(Page(write_page(folder)).images["training loss"]))[..., :3]
        plot = picture[:, : int(0.8 * picture.shape[1])]  # the legend is at the right
        return int((abs(plot - [0x1F / 255, 0x77 / 255, 0xB4 / 255]).max(axis=2) < 0.1).sum())

    assert coloured(6.0) > 10
    assert coloured(6.0, 5.5) > 10


def test_stages_of_one_length_stand_in_the_order_of_training(tmp_path: Path):
    """A model trained from scratch may repeat a length; the last stage trained is the run's result."""
    folder = made_run(tmp_path / "run")
    mark = json.loads((folder / "stages" / "one" / "finished.json").read_text())
    for index, (name, seq_len) in enumerate([("warm", 64), ("again", 64), ("long", 128)]):
        (folder / "stages" / name).mkdir()
        values = {**mark, "stage": name, "seq_len": seq_len, "index": index}
        (folder / "stages" / name / "finished.json").write_text(json.dumps(values))
    shutil.rmtree(folder / "stages" / "one")
    assert [stage["stage"] for stage in finished_stages(folder)] == ["warm", "again", "long"]
    assert [row[0] for row in Page(write_page(folder)).tables["Stages"][1:]] == ["warm", "again", "long"]


def test_stages_of_a_later_start_that_selects_others_come_last(tmp_path: Path):
    """Its stages are counted anew: with only=[s2k,s4k] s4k has the index 1, as s1k had with only=[s512,s1k,s2k]."""
    folder = made_run(tmp_path / "run")
    mark = json.loads((folder / "stages" / "one" / "finished.json").read_text())
    for name, index, step in (("s512", 0, 4), ("s1k", 1, 8), ("s2k", 2, 12), ("s4k", 1, 16)):
        (folder / "stages" / name).mkdir()
        values = {**mark, "stage": name, "seq_len": 512, "index": index, "step": step}
        (folder / "stages" / name / "finished.json").write_text(json.dumps(values))
    shutil.rmtree(folder / "stages" / "one")
    assert [stage["stage"] for stage in finished_stages(folder)] == ["s512", "s1k", "s2k", "s4k"]


def test_a_run_that_has_not_begun_shows_its_settings(tmp_path: Path):
    (tmp_path / "config.yaml").write_text("name: x\n")
    page = Page(write_page(tmp_path))
    assert (page.tables, page.images, page.texts["pre"]) == ({}, {}, "name: x\n")


def test_names_are_shown_as_they_are(tmp_path: Path):
    name, stage = "<b>a&b</b>", "_s$1$ <i>"
    summary = {
        "needle": {"<script>": {"512": 0.5}}, "needle_pooled": {"<script>": 0.5}, "loss": {"<script>": {"512": 2.0}},
        "adapter": {"rank": 4, "bytes": 1e6, "profile": "<u>"},
    }  # fmt: skip
    page = Page(write_page(made_run(tmp_path / name.replace("/", ""), stage, summary=summary)))
    assert page.texts["h1"] == name.replace("/", "")
    assert page.tables["Stages"][1][0] == stage
    assert page.tables["Needles found"][1][0] == "<script>"
    assert "profile <u>" in page.texts["p"]
    assert page.texts["pre"] == "name: <made>\n"
    assert not {"script", "b", "i", "u", "made"} & page.tags
    assert page.images["training loss"][:4] == b"\x89PNG"


def test_models_measured_at_different_lengths_stand_in_one_table(tmp_path: Path):
    summary = {
        "needle": {"a": {"512": 1.0}, "b": {"512": 0.9997, "16384": 0.25}}, "needle_pooled": {"a": 1.0, "b": 0.6248},
        "loss": {"a": {"1024": 3.0}, "b": {"512": 2.0}},
    }  # fmt: skip
    page = Page(write_page(made_run(tmp_path / "run", summary=summary)))
    assert page.tables["Needles found"] == [
        ["model", "512", "16,384", "pooled"], ["a", "100.0 %", "", "100.0 %"], ["b", "99.97 %", "25.0 %", "62.5 %"]
    ]  # fmt: skip
    assert page.tables["Loss on held-out text"][1:] == [["a", "", "3.0000"], ["b", "2.0000", ""]]


def test_a_line_that_a_kill_left_half_written_is_no_step(tmp_path: Path):
    folder = made_run(tmp_path / "run")
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"stage": "s64", "tokens": 768, "lo')
    assert Page(write_page(folder)).tables["Stages"][1][5] == "5.5000"


@pytest.mark.parametrize("name", ["stages/one/finished.json", "summary.json"])
@pytest.mark.parametrize("text", ["", '{"stage": "s6'])
def test_a_record_that_is_cut_short_is_refused_by_its_name(tmp_path: Path, name: str, text: str):
    folder = made_run(tmp_path / "run", summary={"needle": {}, "loss": {}})
    (folder / name).write_text(text)
    with pytest.raises(UserError, match=rf"run/{name}, the .* is (empty|damaged or cut short);.* `longctx train`"):
        write_page(folder)


def test_the_folder_may_be_the_one_one_stands_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    made_run(tmp_path / "run")
    monkeypatch.chdir(tmp_path / "run")
    assert run(ReportConfig(run=".")) == 0
    assert Page(Path("report.html")).texts["h1"] == "run"


def test_a_folder_without_a_run_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match=r"holds no config\.yaml, so it is not the folder of a run"):
        write_page(tmp_path)


def test_a_folder_that_takes_no_file_is_refused_with_the_pages_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A read-only disk; the name under which the page is half written is nobody's business."""
    folder = made_run(tmp_path / "run")

    def refuse(path: Path, *_: Any, **__: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr(Path, "write_text", refuse)
    with pytest.raises(UserError, match=r"run/report\.html cannot be written: Read-only .*run=COPY"):
        run(ReportConfig(run=str(folder)))
    with pytest.raises(OSError, match="Read-only") as refused:
        write_page(folder)
    assert refused.value.filename == str(folder / "report.html")
