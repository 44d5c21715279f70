import gzip
import json

import pytest

from longctx.data import files
from longctx.data.files import Tally, find_files, read, units_of
from longctx.data.stdlib import docstrings, stdlib_files
from longctx.errors import UserError


def _read_all(path, name, column="text"):
    tally = Tally()
    documents = [d for unit in units_of(path, name, column) for d in read(unit, tally)]
    return documents, tally


def test_text_folders_with_every_kind_of_file(tmp_path):
    import zstandard

    (tmp_path / "sub").mkdir()
    (tmp_path / "a.txt").write_text("plain \u00e9")
    (tmp_path / "sub/b.md").write_text("# head")
    with gzip.open(tmp_path / "c.txt.gz", "wb") as out:
        out.write(b"packed")
    (tmp_path / "d.md.zst").write_bytes(zstandard.ZstdCompressor().compress(b"zs"))
    (tmp_path / "e.jsonl").write_text('{"text": "one"}\n\n{"text": "two"}\n')
    (tmp_path / "f.bin").write_bytes(b"\0")
    found = find_files(str(tmp_path), [], [], "k")
    assert [name for _, name in found] == ["a.txt", "c.txt.gz", "d.md.zst", "e.jsonl", "sub/b.md"]
    contents = {d.id: d.content for path, name in found for d in _read_all(path, name)[0]}
    assert contents == {
        "a.txt": "plain \u00e9",
        "c.txt.gz": "packed",
        "d.md.zst": "zs",
        "e.jsonl:1": "one",
        "e.jsonl:3": "two",
        "sub/b.md": "# head",
    }
    assert [n for _, n in find_files(str(tmp_path), ["*.md"], [], "k")] == ["sub/b.md"]
    assert [n for _, n in find_files(str(tmp_path), [], ["*.jsonl", "*.gz", "*.zst"], "k")] == [
        "a.txt",
        "sub/b.md",
    ]
    assert find_files(str(tmp_path / "a.txt"), [], [], "k") == [(tmp_path / "a.txt", "a.txt")]


@pytest.mark.parametrize("size", [1, 7, 40, 64, 1000])
def test_ranges_of_a_file_give_every_line_once_with_its_number(tmp_path, monkeypatch, size):
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps({"text": "y" * (i % 13)}) + "\n" for i in range(60)))
    monkeypatch.setattr(files, "RANGE", size)
    units = units_of(path, "x.jsonl", "text")
    assert len(units) == -(-path.stat().st_size // size)
    documents, tally = _read_all(path, "x.jsonl")
    assert [d.id for d in documents] == [f"x.jsonl:{i + 1}" for i in range(60)]
    assert [len(d.content) for d in documents] == [i % 13 for i in range(60)]
    assert tally.seen == 60


def test_broken_lines_are_counted_and_named(tmp_path):
    path = tmp_path / "x.jsonl"
    lines = [
        b'{"text": "fine"}',
        b'{"text": "cut',
        b'{"body": "other"}',
        b"[1, 2]",
        b'{"text": 7}',
        b'{"text": "\xff"}',
        b'{"text": "last"}',
    ]
    path.write_bytes(b"\n".join(lines))
    documents, tally = _read_all(path, "x.jsonl")
    assert [d.content for d in documents] == ["fine", "last"]
    assert (tally.seen, tally.broken) == (7, 5)
    assert tally.where[0].startswith("x.jsonl:2: ")
    assert "no field 'text' (it has body)" in tally.where[1]
    assert tally.where[3] == "x.jsonl:5: the field holds int, not text or messages"


def test_files_that_are_not_utf8_or_damaged_are_counted(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    packed = gzip.compress(b"x" * 1000)
    (tmp_path / "b.txt.gz").write_bytes(packed[:-9])
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(b'{"text": "q"}\n' * 3)[:-9])
    _, tally = _read_all(tmp_path / "a.txt", "a.txt")
    assert (tally.not_utf8, tally.where) == (1, ["a.txt is not UTF-8 (byte 3)"])
    _, tally = _read_all(tmp_path / "b.txt.gz", "b.txt.gz")
    assert tally.broken == 1
    documents, tally = _read_all(tmp_path / "c.jsonl.gz", "c.jsonl.gz")
    assert tally.broken == 1
    assert "c.jsonl.gz:" in tally.where[0]
    assert len(documents) <= 3


def test_parquet_by_row_groups(tmp_path, monkeypatch):
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"text": [f"row {i}" for i in range(25)], "n": list(range(25))}), path, row_group_size=4)
    monkeypatch.setattr(files, "RANGE", 300)
    assert len(units_of(path, "x.parquet", "text")) > 1
    documents, tally = _read_all(path, "x.parquet")
    assert [(d.id, d.content) for d in documents] == [(f"x.parquet:{i}", f"row {i}") for i in range(25)]
    assert tally.seen == 25
    with pytest.raises(UserError, match=r"no column 'body'; it has text, n"):
        units_of(path, "x.parquet", "body")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(UserError, match="cannot be read as parquet"):
        units_of(tmp_path / "bad.parquet", "bad.parquet", "text")


def test_folders_without_a_usable_file_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"data\.path=.* does not exist"):
        find_files(str(tmp_path / "nowhere"), [], [], "data.path")
    (tmp_path / "a.doc").write_text("x")
    with pytest.raises(UserError, match=r"holds no usable file: 1 files"):
        find_files(str(tmp_path), [], [], "data.path")
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(UserError, match="1 are left out by include and exclude"):
        find_files(str(tmp_path), ["*.md"], [], "data.path")


def test_the_standard_library_is_text_without_its_tests():
    found = {name: path for path, name in stdlib_files()}
    assert "json/decoder.py" in found
    assert "argparse.py" in found
    assert not any(part in name.split("/") for name in found for part in ("test", "site-packages"))
    page = docstrings(found["json/decoder.py"].read_text(), "json/decoder.py")
    assert page.startswith("# json/decoder.py\n\nImplementation of JSONDecoder\n")
    assert "# JSONDecoder\n" in page
    assert docstrings("def f(:", "x.py") == ""
    assert docstrings("x = 1", "x.py") == ""


def test_a_python_without_sources_is_told_what_to_do(tmp_path):
    with pytest.raises(UserError, match=r"data=text data\.path=FOLDER"):
        stdlib_files(tmp_path)
