import ast
import gzip
import json
import random
import re
import zlib
from itertools import accumulate
from pathlib import Path

import pytest

from longctx.config.base import build
from longctx.config.data import DataConfig
from longctx.data import files
from longctx.data.check import check_sources
from longctx.data.documents import Tally
from longctx.data.files import find_files, read, units_of
from longctx.data.shard import bucket_of
from longctx.data.stdlib import docstrings, stdlib_files
from longctx.errors import UserError


def _read_all(path, name, column="text"):
    tally = Tally()
    documents = [d for unit in units_of(path, name, column) for d in read(unit, tally)]
    return documents, tally


def test_folders_that_are_linked_are_read_once(tmp_path):
    for folder in ("corpus/v2", "elsewhere/deep"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "x.txt").write_text(folder)
    corpus = tmp_path / "corpus"
    for name, target in (("wiki", "elsewhere"), ("again", "elsewhere/deep"), ("latest", "corpus/v2"), ("up", "corpus")):
        (corpus / name).symlink_to(tmp_path / target)
    found = {path.read_text(): name for path, name in find_files(str(corpus), [], [], "k")}
    assert len(find_files(str(corpus), [], [], "k")) == 2
    assert found == {"corpus/v2": "v2/x.txt", "elsewhere/deep": "again/x.txt"}


def test_hidden_files_and_folders_are_left_out(tmp_path):
    for name in (".git/logs/x.txt", ".ipynb_checkpoints/a.md", ".b.md", ".hidden/real/a.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("hidden")
    root = tmp_path / ".hidden/real"  # what the user names is read
    (root / ".linked").symlink_to(tmp_path / ".git")
    assert [name for _, name in find_files(str(root), [], [], "k")] == ["a.md"]
    with pytest.raises(UserError, match=r"holds no usable file: of 0 that are not hidden, none is .*\.arrow"):
        find_files(str(tmp_path), [], [], "k")


def test_of_a_saved_dataset_dict_the_train_split_is_read(tmp_path, capsys):
    def saved(splits):
        folder = tmp_path / "-".join(splits)
        for split in splits:
            (folder / split).mkdir(parents=True)
            for name in ("data-00000-of-00001.arrow", "cache-4f2a.arrow", "state.json", "dataset_info.json"):
                (folder / split / name).touch()
        (folder / "dataset_dict.json").write_text(json.dumps({"splits": splits}))
        return str(folder)

    both = saved(["train", "test"])
    assert [name for _, name in find_files(both, [], [], "k")] == ["train/data-00000-of-00001.arrow"]
    assert "its split train is read, and test left out" in " ".join(capsys.readouterr().err.split())
    assert [name for _, name in find_files(both, ["test/*"], [], "k")] == ["test/data-00000-of-00001.arrow"]
    other = saved(["test", "validation"])
    with pytest.raises(UserError, match=r"it has test, validation: name the folder of one, such as k=.*/test"):
        find_files(other, [], [], "k")
    assert len(find_files(f"{other}/test", [], [], "k")) == 1


def test_a_file_that_two_sources_read_under_two_names_is_named(tmp_path, capsys):
    (tmp_path / "books").mkdir()
    (tmp_path / "books/x.txt").write_text("apple river stone")
    sources = {name: {"kind": "text", "path": str(path)} for name, path in
               {"all": tmp_path, "same": tmp_path, "books": tmp_path / "books"}.items()}  # fmt: skip
    for heldout, names in ((0.1, ["all", "same"]), (0.0, ["all", "books"]), (0.1, ["all", "books"])):
        values = {"sources": sources, "mixes": {"m": {"all": 1.0}}, "heldout": heldout}
        check_sources(build(DataConfig, values, origin="test"), names, tmp_path / "c")
        said = capsys.readouterr().err
        assert ("as books/x.txt and as x.txt" in said) == (names == ["all", "books"] and heldout > 0)


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
        "e.jsonl:byte0": "one",
        "e.jsonl:byte17": "two",
        "sub/b.md": "# head",
    }
    assert [n for _, n in find_files(str(tmp_path), ["*.md"], [], "k")] == ["sub/b.md"]
    assert [n for _, n in find_files(str(tmp_path), [], ["*.jsonl", "*.gz", "*.zst"], "k")] == [
        "a.txt",
        "sub/b.md",
    ]
    assert find_files(str(tmp_path / "a.txt"), [], [], "k") == [(tmp_path / "a.txt", "a.txt")]


@pytest.mark.parametrize("size", [1, 7, 40, 64, 1000])
def test_ranges_of_a_file_give_every_line_once_by_its_byte(tmp_path, monkeypatch, size):
    path = tmp_path / "x.jsonl"
    lines = [json.dumps({"text": "y" * (i % 13)}) + "\n" for i in range(60)]
    path.write_text("".join(lines))
    monkeypatch.setattr(files, "RANGE", size)
    units = units_of(path, "x.jsonl", "text")
    assert len(units) == -(-path.stat().st_size // size)
    documents, tally = _read_all(path, "x.jsonl")
    begins = [0, *accumulate(map(len, lines))]
    assert [d.id for d in documents] == [f"x.jsonl:byte{at}" for at in begins[:60]]
    assert [str(d.location) for d in documents] == [f"x.jsonl:{i + 1}" for i in range(60)]
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
    assert (tally.not_utf8, tally.where) == (1, ["a.txt: not UTF-8 (byte 3)"])
    _, tally = _read_all(tmp_path / "b.txt.gz", "b.txt.gz")
    assert tally.broken == 1
    documents, tally = _read_all(tmp_path / "c.jsonl.gz", "c.jsonl.gz")
    assert tally.broken == 1
    assert "c.jsonl.gz:" in tally.where[0]
    assert len(documents) <= 3


@pytest.mark.parametrize("size", [30, 100, 10_000])
def test_a_mistake_in_a_later_range_is_named_by_its_line(tmp_path, monkeypatch, size):
    path = tmp_path / "x.jsonl"
    lines = [json.dumps({"text": f"line {i}"}) for i in range(1, 41)]
    lines[29] = lines[29][:-1]
    path.write_text("\n".join(lines) + "\n")
    monkeypatch.setattr(files, "RANGE", size)
    documents, tally = _read_all(path, "x.jsonl")
    assert len(documents) == 39
    assert tally.where[0].startswith("x.jsonl:30: ")


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="Linux tells how much a process has read")
def test_units_read_their_own_part_of_a_file(tmp_path, monkeypatch):
    """A unit reads no bytes before its beginning, wherever that is, so that all units together read the file once."""
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps({"text": "z" * 1000}) + "\n" for _ in range(4000)))
    monkeypatch.setattr(files, "RANGE", 2**16)
    before = _bytes_read()
    documents, _ = _read_all(path, "x.jsonl")
    assert len(documents) == 4000
    assert _bytes_read() - before < 2 * path.stat().st_size


def _bytes_read():
    return int(Path("/proc/self/io").read_text().split()[1])


def _words(count):
    rng = random.Random(0)
    return [json.dumps({"text": " ".join(str(rng.random()) for _ in range(20))}) for _ in range(count)]


def _damaged(lines, packing):
    """An archive with a block in its middle whose type the format does not have."""
    import zstandard

    halves = ["".join(line + "\n" for line in part).encode() for part in (lines[:1000], lines[1000:])]
    if packing == "gz":
        packer = zlib.compressobj(wbits=31)
        first = packer.compress(halves[0]) + packer.flush(zlib.Z_FULL_FLUSH)
        packed, at = first + packer.compress(halves[1]) + packer.flush(), len(first)
        unpack, error = gzip.decompress, zlib.error
    else:
        first, second = (zstandard.ZstdCompressor().compress(half) for half in halves)
        packed, at = first + second, len(first) + zstandard.frame_header_size(second)
        unpack, error = lambda data: zstandard.ZstdDecompressor().decompress(data[len(first) :]), zstandard.ZstdError
    damaged = packed[:at] + bytes([packed[at] | 0b110]) + packed[at + 1 :]
    with pytest.raises(error):
        unpack(damaged)
    return damaged


@pytest.mark.parametrize("packing", ["gz", "zst"])
def test_a_flipped_byte_within_an_archive_is_a_broken_record(tmp_path, packing):
    lines = _words(2000)
    damaged = _damaged(lines, packing)
    for name in (f"a.jsonl.{packing}", f"b.txt.{packing}"):
        (tmp_path / name).write_bytes(damaged)
        documents, tally = _read_all(tmp_path / name, name)
        assert tally.broken >= 1
        assert tally.where[0].startswith(f"{name}:")
        if name == f"a.jsonl.{packing}":
            before = int(tally.where[0].split(":")[1])  # the line that could not be read
            assert [d.content for d in documents[: before - 1]] == [json.loads(x)["text"] for x in lines[: before - 1]]


def test_a_zst_of_several_frames_is_read_to_its_end_and_a_cut_one_is_broken(tmp_path):
    import zstandard

    lines = [line + "\n" for line in _words(3000)]
    frames = [zstandard.ZstdCompressor().compress("".join(lines[a : a + 1000]).encode()) for a in range(0, 3000, 1000)]
    path = tmp_path / "x.jsonl.zst"
    path.write_bytes(b"".join(frames))
    documents, tally = _read_all(path, "x.jsonl.zst")
    assert (len(documents), tally.broken) == (3000, 0)
    path.write_bytes(b"".join(frames)[: -len(frames[-1]) // 2])
    documents, tally = _read_all(path, "x.jsonl.zst")
    assert tally.broken == 1
    assert 2000 <= len(documents) < 3000
    assert tally.where[0].startswith(f"x.jsonl.zst:{len(documents) + 1}: the file ends within")


def test_a_row_group_that_cannot_be_read_is_broken_and_the_others_are_read(tmp_path, monkeypatch):
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "x.parquet"
    rows = [f"row {i} " + "".join(map(str, random.Random(i).sample(range(100), 50))) for i in range(60)]
    pq.write_table(pa.table({"text": rows}), path, row_group_size=10, compression="gzip", use_dictionary=False)
    column = pq.ParquetFile(path).metadata.row_group(3).column(0)
    data = bytearray(path.read_bytes())
    middle = column.data_page_offset + column.total_compressed_size // 2
    data[middle : middle + 40] = bytes(40)
    path.write_bytes(data)
    monkeypatch.setattr(files, "RANGE", 1)
    documents, tally = _read_all(path, "x.parquet")
    assert [d.content for d in documents] == rows[:30] + rows[40:]
    assert (tally.seen, tally.broken) == (51, 1)
    assert tally.where[0].startswith("x.parquet:30: ")


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
    with pytest.raises(UserError, match=r"holds no usable file: of 1 "):
        find_files(str(tmp_path), [], [], "data.path")
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(
        UserError, match=r"holds 1 files of .*, the first a\.txt, and include=\['\*\.md'\] .* leave out all"
    ):
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


def test_the_docstrings_stand_in_the_order_of_the_syntax_tree():
    """Level by level, as `ast.walk` visits them, from all statements that hold others."""
    source = """
try:
    class A:
        "a"
        def deep(self): "deep"
except OSError:
    def handled(): "handled"
else:
    def otherwise(): "otherwise"
finally:
    async def last(): "last"
match x:
    case 1:
        def matched(): "matched"
for x in (lambda: "no docstring",):
    with y:
        while z:
            def nested(): "nested"
    "a string"
else:
    if z: pass
    elif y:
        class B: "b"
"""
    named = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    names = [node.name for node in ast.walk(ast.parse(source)) if isinstance(node, named)]
    assert re.findall(r"^# (.*)$", docstrings(source, "x.py"), re.MULTILINE) == names
    assert len(names) == 8


def test_a_python_without_sources_is_told_what_to_do(tmp_path):
    with pytest.raises(UserError, match=r"data=text data\.path=FOLDER"):
        stdlib_files(tmp_path)


def test_a_file_that_one_source_holds_out_and_another_trains_on_is_told(tmp_path, capsys):
    """Of few documents each source holds out the one with the lowest hash, and a part of them has another lowest."""
    names = [f"book{number}.txt" for number in range(6)]
    for name in names:
        (tmp_path / name).write_text(f"the text of {name}\n")
    first, second, *_ = sorted(names, key=bucket_of)
    for heldout, told in ((0.001, True), (0.9, False)):
        source = {"kind": "text", "path": str(tmp_path)}
        values = {"sources": {"all": source, "some": {**source, "exclude": [first]}}, "heldout": heldout,
                  "mixes": {"m": {"all": 1.0}}}  # fmt: skip
        data = build(DataConfig, values, origin="test")
        for names_of in (["all", "some"], ["some", "all"]):
            check_sources(data, names_of, tmp_path / "cache")
            said = " ".join(capsys.readouterr().err.split())
            assert (f"both read {tmp_path / second}, and one of them holds it out" in said) == told
    check_sources(data, ["all", "all"], tmp_path / "cache")
    assert capsys.readouterr().err == ""
