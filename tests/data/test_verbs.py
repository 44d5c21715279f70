import json
import re

import pytest

from longctx.cli import main
from longctx.data.needle_keys import split_of
from longctx.data.shard import bucket_of


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "docs"
    path.mkdir()
    for number in range(30):
        (path / f"{number}.txt").write_text(f"document {number}\n" + "words and more words\n" * (20 + 9 * number))
    return path


def _run(capsys, *words):
    status = main(list(words))
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_data_then_stats_over_a_folder(folder, model, tmp_path, capsys):
    common = [
        f"model.path={model}",
        "data=text",
        f"data.path={folder}",
        f"run_dir={tmp_path}/run",
        "format=json",
        "workers=1",
    ]
    status, out, _ = _run(capsys, "data", *common)
    assert status == 0
    source = json.loads(out)["sources"]["text"]
    assert source["documents"] + source["heldout_documents"] == 30
    assert (tmp_path / "run/data/shards").is_dir()

    status, out, err = _run(capsys, "data", "stats", *common)
    document = json.loads(out)
    assert status == 0
    assert document["sources"]["text"]["tokens"] == source["tokens"]
    assert set(document["stages"]) == {"s2048", "s8192"}
    for stage in document["stages"].values():
        use = stage["sources"]["text"]
        assert use["epochs"] == pytest.approx(stage["sequences"] * stage["seq_len"] / source["tokens"], rel=0.01)
    assert document["epochs"]["text"] > 4
    assert "will be read" in err
    assert (tmp_path / "run/data_stats.png").stat().st_size > 10_000


def test_documents_made_anew_have_no_epochs(folder, model, tmp_path, capsys):
    """The table had a dash for them, and the document as many epochs as the curriculum has stages."""
    words = [f"model.path={model}", "data=text", f"data.path={folder}", f"run_dir={tmp_path}/run", "workers=1"]
    synth = [
        "+data.sources.asked={kind: synth, haystack: text, task: {kind: needle}}",
        "data.mixes.default={text: 0.5, asked: 0.5}",
    ]
    status, out, err = _run(capsys, "data", "stats", *words, *synth, "format=json")
    assert status == 0, err
    document = json.loads(out)
    assert list(document["epochs"]) == ["text"]
    assert all(stage["sources"]["asked"]["epochs"] is None for stage in document["stages"].values())
    assert _run(capsys, "data", "stats", *words, *synth)[0] == 0


def test_stats_warn_of_a_stage_of_padding(folder, model, tmp_path, capsys):
    words = [f"model.path={model}", "data=text", f"data.path={folder}", f"run_dir={tmp_path}/run", "workers=1"]
    cut = "data.mixes.default={text: {weight: 1.0, length: {cut: {length: 1200}}}}"
    status, out, err = _run(capsys, "data", "stats", *words, cut, "curriculum.only=[s2048]", "format=json")
    assert status == 0, err
    padding = json.loads(out)["stages"]["s2048"]["padding"]
    assert f"stage s2048: {padding:.0%} of its positions are padding" in err
    assert "take a length of 1,024 tokens (data.mixes.default.text.length)" in err


def test_a_long_held_out_document_is_counted_apart_and_remarked(folder, model, tmp_path, capsys, monkeypatch):
    """The hash of a name decides, so most of the tokens may be held out; the other columns are of what is trained."""
    monkeypatch.setenv("COLUMNS", "200")
    held = [file for file in folder.iterdir() if bucket_of(file.name) < 0.05 * 2**32]
    held[0].write_text("one document is far longer than the others together\n" * 9000)
    words = [f"model.path={model}", "data=text", f"data.path={folder}", f"run_dir={tmp_path}/run", "workers=1"]
    status, out, err = _run(capsys, "data", "stats", *words, "format=json")
    assert status == 0
    source = json.loads(out)["sources"]["text"]
    assert source["heldout_documents"] == len(held)
    assert source["longest"] < source["tokens"] < source["heldout_tokens"]
    share = source["heldout_tokens"] / (source["heldout_tokens"] + source["tokens"])
    said = f"source text: {share:.0%} of its tokens are held out from training, in {len(held)} of its documents"
    assert said in err
    _, table, _ = _run(capsys, "data", "stats", *words)
    head, row = (line.split() for line in table.splitlines()[1:3])
    assert head[-4:] == ["held-out", "documents", "held-out", "tokens"]
    assert row[-2:] == [f"{len(held):,}", f"{source['heldout_tokens']:,}"]
    assert row[4] == f"{source['longest']:,}"
    assert said not in _run(capsys, "data", "stats", *words, "data.heldout=0")[2]


def test_data_says_what_it_tokenizes_and_what_it_finds_stored(folder, model, tmp_path, capsys):
    words = ["data", f"model.path={model}", "data=text", f"data.path={folder}", f"run_dir={tmp_path}/run", "workers=1"]
    said = []
    for number in range(3):
        if number == 2:
            (folder / "z.txt").write_text("one more document " * 80000)
        status, _, err = _run(capsys, *words)
        assert status == 0
        said.append([line for line in err.splitlines() if line.startswith("text: ")])
    assert said[0] == ["text: tokenizing 1 of 1 shards, 0.1 MiB of input"]
    assert said[1] == ["text: found stored, 1 of 1 shards"]
    assert said[2] == ["text: tokenizing 1 of 2 shards, 1.4 MiB of input"]


def test_documents_that_are_all_too_short_or_a_mix_that_is_none_are_refused(folder, model, tmp_path, capsys):
    words = [f"model.path={model}", "data=text", f"data.path={folder}", f"run_dir={tmp_path}/run", "workers=1"]
    status, _, err = _run(capsys, "data", "stats", *words, "curriculum.mix=nope")
    assert status == 2
    assert "curriculum.stages.s2048.mix=nope is not one of data.mixes" in err
    assert not (tmp_path / "run").exists()  # before anything is tokenized
    for word, rule in (("min_len=1M", "min_len=1,048,576"), ("max_len=1", "min_len=0 with max_len=1")):
        status, _, err = _run(capsys, "data", *words, f"data.sources.text.{word}")
        assert status == 2
        assert "data.sources.text: all 30 documents are left out: they have" in err
        assert f"{rule} keeps none of them" in err


def test_stats_show_the_documents_before_a_stage_that_they_cannot_fill(folder, model, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    words = [f"model.path={model}", "data=text", f"data.path={folder}", f"run_dir={tmp_path}/run", "workers=1"]
    status, out, err = _run(capsys, "data", "stats", *words, "curriculum=8k_to_1048k", "curriculum.only=[s64k]")
    assert status == 2
    assert ">= 65,536 (s64k)" in " ".join(out.split())
    assert "no document is that long" in err
    assert "curriculum.stages.NAME.mix=default" in err
    assert "curriculum.only" in err


def test_the_prolong_preset_plans_both_of_its_stages(model, tmp_path, capsys):
    web = ["fineweb_edu", "fineweb", "stackexchange", "wikipedia", "openwebmath"]
    names = ["code", "books", "textbooks", "tulu", "arxiv", *web]
    for name in names:
        (tmp_path / "docs" / name).mkdir(parents=True)
        for number in range(4):
            count = 3000 if name in ("code", "books") and number % 2 else 100
            (tmp_path / "docs" / name / f"{number}.txt").write_text(f"{name} {number}\n" + "words and more\n" * count)
    status, out, err = _run(
        capsys, "data", "stats", f"model.path={model}", "data=prolong", f"data.path={tmp_path}/docs",
        "data.heldout=0.01", "curriculum.stages.s8192.mix=long",
        f"run_dir={tmp_path}/run", "format=json", "workers=1",
    )  # fmt: skip
    assert status == 0, err
    for name, stage in json.loads(out)["stages"].items():
        tokens = {source: use["tokens"] for source, use in stage["sources"].items()}
        total = stage["sequences"] * stage["seq_len"]
        assert tokens["code"] / total == pytest.approx(0.3, abs=0.05), name
        assert tokens["books"] / total == pytest.approx(0.3, abs=0.05), name
        assert set(tokens) == set(names)


def test_data_of_the_quickstart_is_the_data_of_its_training(model, tmp_path, capsys):
    library = tmp_path / "library"
    library.mkdir()
    for number in range(20):
        (library / f"module{number}.py").write_text(f'"""Module {number}."""\n' + "x = [1, 2, 3]\n" * 60)
    paths = [f"data.sources.{name}.path={library}" for name in ("stdlib", "docs")]
    words = ["experiment=quickstart", f"model.path={model}", *(f"+{path}" for path in paths)]
    status, out, err = _run(capsys, "data", *words, f"run_dir={tmp_path}/run", "format=json")
    assert status == 0, err
    sources = json.loads(out)["sources"]
    assert sources["stdlib"]["documents"] + sources["stdlib"]["heldout_documents"] == 40  # sources and docstrings
    assert sources["docs"]["documents"] + sources["docs"]["heldout_documents"] == 20


def test_synthetic_documents_as_json_lines(folder, tmp_path, capsys):
    """Their texts have no marks; a source that reads them adds its own."""
    out_path = tmp_path / "x/synth.jsonl"
    words = ["data=text", f"data.path={folder}", "haystack=text", "length=600", "count=4",
             "task.kind=needles",
             "task.count=3", "task.questions=2", f"out={out_path}", f"cache={tmp_path}/c"]  # fmt: skip
    status, out, err = _run(capsys, "data", "synth", *words)
    assert status == 0, err
    rows = [json.loads(line) for line in out_path.read_text().splitlines()]
    assert len(rows) == 4
    for row in rows:
        assert len(row["tokens"]) == 600
        assert len(row["answers"]) == 2
        assert all(f"{a['key']}" in row["text"] and split_of(a["key"]) == "eval" for a in row["answers"])
        assert "<|" not in row["text"]
    longest = int(re.search(r"read as data with its marks .*: at most ([\d,]+) tokens", out)[1].replace(",", ""))
    assert 590 <= longest <= 610
    as_data = ["data", "data=text", f"data.path={out_path}", f"run_dir={tmp_path}/run", "data.heldout=0", "workers=1"]
    status, out, err = _run(capsys, *as_data, "model=tiny", "format=json")
    assert status == 0, err
    assert json.loads(out)["sources"]["text"]["longest"] == longest


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data", "data=text"], "path is missing"),
        (["data", "data=text", "data.path=/nowhere/at/all"], "does not exist"),
        (["data", "data=txt"], "did you mean data=text?"),
        (["data", "synth", "haystack=books"], "is not a source of text; known: stdlib"),
        (["data", "synth", "length=40", "data=text", "haystack=text"], "take a longer length"),
        (["data", "synth", "task.kind=needel"], "is not one of"),
        (["data", "stats", "pgn=x.png"], "did you mean png?"),
    ],
)
def test_mistakes_are_one_paragraph_and_status_2(words, message, folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    where = f"cache={tmp_path}/c" if "synth" in words else f"run_dir={tmp_path}/run"
    more = [f"data.path={folder}"] if "haystack=text" in words else []
    status, _, err = _run(capsys, *words, where, *more)
    assert status == 2, err
    assert message in err
    assert "Traceback" not in err
    assert not list(tmp_path.glob("**/*synth.jsonl*"))
