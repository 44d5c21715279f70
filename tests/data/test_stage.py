import json
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from longctx.config.base import build
from longctx.config.data import DataConfig
from longctx.data import open_stage_data
from longctx.data.corpus import Corpus
from longctx.data.prepare import build_source
from longctx.errors import UserError
from tests import warm

from .conftest import make_tokenizer

WORDS = ["apple", "river", "import", "return", "stone", "self", "window", "letter", "42", "1234567"]


def _write_books(folder: Path, count: int, seed: int = 0) -> dict[str, str]:
    rng = np.random.default_rng(seed)
    texts = {}
    for number in range(count):
        lines = [" ".join(rng.choice(WORDS, size=8)) for _ in range(int(rng.integers(1, 60)))]
        texts[f"book{number}.txt"] = f"book {number}\n" + "\n".join(lines) + "\n"
        (folder / f"book{number}.txt").write_text(texts[f"book{number}.txt"])
    return texts


def _config(folder: Path, mix=None, **more) -> DataConfig:
    values = {
        "sources": {
            "books": {"kind": "text", "path": str(folder)},
            "needles": {"kind": "synth", "haystack": "books", "task": {"kind": "needle"}},
        },
        "mixes": {"m": mix or {"books": 1.0}},
        "heldout": 0.2,
        **more,
    }
    return build(DataConfig, values, origin="test")


@pytest.fixture(scope="module")
def books(tmp_path_factory):
    folder = tmp_path_factory.mktemp("books")
    return folder, _write_books(folder, 60)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def _open(config, tokenizer, cache, **more):
    settings = {"mix": "m", "seq_len": 512, "sequences": 20, "seed": 0, "split": "train", "stage": "s512"}
    return open_stage_data(config, tokenizer=tokenizer, cache=cache, **{**settings, **more})


def test_a_sequence_is_its_documents_one_after_another(books, cache, tokenizer):
    folder, texts = books
    stage = _open(_config(folder), tokenizer, cache)
    assert len(stage) == 20
    for index in range(20):
        sequence = stage.sequence(index)
        assert sequence.tokens.shape == sequence.weights.shape == (512,)
        assert sequence.boundaries[0] == 0
        assert sequence.boundaries[-1] == 512
        assert (sequence.weights[sequence.boundaries[:-1]] == 0).all()
        for name, a, b in zip(sequence.documents, sequence.boundaries, sequence.boundaries[1:], strict=False):
            name, _, start = name.removeprefix("books:").partition("@")
            ids = tokenizer(texts[name], add_special_tokens=False).input_ids
            whole = [tokenizer.bos_token_id, *ids, tokenizer.eos_token_id]
            at = int(start or 0)
            assert sequence.tokens[a:b].tolist() == whole[at : at + b - a]
            assert (sequence.weights[a + 1 : b] == 1).all()
        if len(sequence.boundaries) == len(sequence.documents) + 2:  # padding
            assert (sequence.tokens[sequence.boundaries[-2] :] == tokenizer.pad_token_id).all()
            assert (sequence.weights[sequence.boundaries[-2] :] == 0).all()


def test_positions_can_be_read_alone(books, cache, tokenizer):
    folder, _ = books
    mix = {"books": 0.6, "needles": {"weight": 0.4, "length": {"loguniform": {"min_len": 128}}}}
    stage = _open(_config(folder, mix), tokenizer, cache)
    rng = np.random.default_rng(0)
    for index in range(20):
        whole = stage.sequence(index)
        for positions in (
            np.arange(64, 128),
            np.r_[0:64, 448:512],
            np.sort(rng.choice(512, 100, replace=False)),
            rng.permutation(512),
            np.zeros(0, np.int64),
        ):
            assert np.array_equal(stage.tokens(index, positions), whole.tokens[positions])
            assert np.array_equal(stage.weights(index, positions), whole.weights[positions])
        part = stage.local(index, np.r_[0:64, 448:512])
        assert np.array_equal(part.labels[:-1], whole.tokens[np.r_[1:65, 449:512]])
        assert part.labels[-1] == -100
        assert np.array_equal(part.weights, np.r_[whole.weights[1:65], whole.weights[449:512], 0])
    with pytest.raises(IndexError):
        stage.sequence(20)


def test_the_same_stage_opened_again_is_the_same(books, cache, tmp_path, tokenizer):
    folder, _ = books
    mix = {"books": 0.5, "needles": 0.5}
    first, again = (_open(_config(folder, mix), tokenizer, c) for c in (cache, tmp_path))
    for index in (19, 3, 0):
        a, b = first.sequence(index), again.sequence(index)
        assert np.array_equal(a.tokens, b.tokens)
        assert np.array_equal(a.weights, b.weights)
        assert a.documents == b.documents


def test_held_out_documents_are_never_trained_on(books, cache, tokenizer):
    folder, _ = books
    seen = {}
    for split in ("train", "heldout"):
        stage = _open(_config(folder), tokenizer, cache, split=split, sequences=200)
        seen[split] = {name.partition("@")[0] for i in range(200) for name in stage.documents(i)}
    assert not seen["train"] & seen["heldout"]
    names = {}
    for split in ("train", "heldout"):
        corpus = _corpus(_config(folder), tokenizer, cache, split)
        names[split] = {corpus.document_name(i) for i in range(len(corpus))}
        assert {name.removeprefix("books:") for name in seen[split]} <= names[split]
    assert not names["train"] & names["heldout"]
    assert len(names["train"] | names["heldout"]) == 60
    assert 4 <= len(names["heldout"]) <= 22


def test_one_text_file_of_two_is_held_out_when_the_hash_takes_none(tmp_path, tokenizer):
    (tmp_path / "d").mkdir()
    _write_books(tmp_path / "d", 2)
    config = _config(tmp_path / "d", heldout=1e-6)
    counts = [len(_corpus(config, tokenizer, tmp_path, split)) for split in ("train", "heldout")]
    assert counts == [1, 1]


def _corpus(config, tokenizer, cache, split="train"):
    folders, _ = build_source("books", config, tokenizer, cache)
    return Corpus("books", config.sources["books"], folders, split=split, heldout=config.heldout)


def test_concat_without_masks_predicts_across_documents(books, cache, tokenizer):
    folder, _ = books
    config = _config(folder, packing="concat", document_mask=False, first_token="predict")
    stage = _open(config, tokenizer, cache)
    assert stage.stats()["padding"] == 0
    for index in range(20):
        sequence = stage.sequence(index)
        assert sequence.boundaries.tolist() == [0, 512]
        assert np.array_equal(sequence.weights, np.r_[0, np.ones(511)])


def test_tokens_are_stored_by_content(books, tmp_path, tokenizer):
    folder = tmp_path / "copy"
    folder.mkdir()
    _write_books(folder, 60)
    config = _config(folder)
    first, fresh = build_source("books", config, tokenizer, tmp_path)
    assert fresh
    times = [path.stat().st_mtime_ns for path in first]
    (folder / "book3.txt").touch()
    again, fresh = build_source("books", config, tokenizer, tmp_path)
    assert (again, fresh) == (first, False)
    assert [path.stat().st_mtime_ns for path in again] == times
    was = (folder / "book3.txt").stat()
    (folder / "book3.txt").write_text("something else\n".ljust(was.st_size))
    os.utime(folder / "book3.txt", ns=(was.st_atime_ns, was.st_mtime_ns))  # as cp -p and rsync leave it
    changed, fresh = build_source("books", config, tokenizer, tmp_path)
    assert fresh
    assert changed != first
    other, fresh = build_source("books", config, make_tokenizer(400), tmp_path)
    assert fresh
    assert not set(other) & set(changed)


def test_an_interrupted_build_continues_with_the_shards_that_are_missing(tmp_path, tokenizer, monkeypatch):
    from longctx.data import prepare

    (tmp_path / "d").mkdir()
    _write_books(tmp_path / "d", 12)
    monkeypatch.setattr(prepare, "SMALLEST_SHARD", 2000)
    config = _config(tmp_path / "d")
    calls = []

    def stop_at_three(job, spec):
        calls.append(job.folder)
        if len(calls) == 3:
            raise KeyboardInterrupt
        real(job, spec)

    real = prepare.tokenize_shard
    monkeypatch.setattr(prepare, "tokenize_shard", stop_at_three)
    with pytest.raises(KeyboardInterrupt):
        build_source("books", config, tokenizer, tmp_path / "c")
    monkeypatch.setattr(prepare, "tokenize_shard", real)
    kept = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "c/shards").iterdir()}
    assert set(kept) == {path.name for path in calls[:2]}
    folders, _ = build_source("books", config, tokenizer, tmp_path / "c")
    assert len(folders) > 3
    assert all((tmp_path / "c/shards" / name).stat().st_mtime_ns == when for name, when in kept.items())


def _build_in_child(folder, cache, results):
    from tests.data.conftest import make_tokenizer

    folders, fresh = build_source("books", _config(Path(folder)), make_tokenizer(), Path(cache), workers=2)
    results.put(([str(f) for f in folders], fresh))


def test_two_processes_that_start_together_build_once(tmp_path):
    (tmp_path / "d").mkdir()
    _write_books(tmp_path / "d", 20)
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    children = [
        context.Process(target=_build_in_child, args=(str(tmp_path / "d"), str(tmp_path / "c"), results))
        for _ in range(2)
    ]
    for child in children:
        child.start()
    found = [results.get(timeout=250) for _ in children]
    for child in children:
        child.join()
    assert found[0][0] == found[1][0]
    assert {path.name for path in (tmp_path / "c/shards").iterdir()} == {Path(p).name for p in found[0][0]}


def test_a_build_waits_for_one_of_other_files_that_shares_a_shard(tmp_path, tokenizer, monkeypatch):
    """The second folder has a file more, so its list of shards is another and the first shard the same."""
    from longctx.data import prepare
    from longctx.signals import beside, temporary
    from longctx.storage import files

    folder, cache, waits = tmp_path / "d", tmp_path / "c", threading.Event()
    folder.mkdir()
    _write_books(folder, 2)
    monkeypatch.setattr(prepare, "SMALLEST_SHARD", 1)
    monkeypatch.setattr(files, "say", lambda text: waits.set() if "waiting" in text else None)
    real, seen, others = prepare.tokenize_shard, [], []

    def start_another_build(job, spec):
        monkeypatch.setattr(prepare, "tokenize_shard", real)
        with temporary(beside(job.folder)) as partial:
            partial.mkdir()
            (folder / "more.txt").write_text("one more text\n" * 9)
            others.append(pool.submit(build_source, "books", _config(folder), tokenizer, cache))
            while not others[0].done() and not waits.wait(0.05):
                pass
            seen.append(partial.exists())
        real(job, spec)

    with ThreadPoolExecutor(1) as pool:
        monkeypatch.setattr(prepare, "tokenize_shard", start_another_build)
        first, _ = build_source("books", _config(folder), tokenizer, cache)
        more, fresh = others[0].result(timeout=60)
    assert seen == [True]
    assert fresh
    assert len({*first} & {*more}) == 2
    assert len(more) == 3


def _tokenize_pipes(pipes, out):
    """Two shards, each of a file that never ends, by two workers."""
    from longctx.data import prepare
    from longctx.data.documents import Unit
    from longctx.data.tokens import ShardJob
    from tests.data.conftest import make_tokenizer

    data = _config(Path(pipes[0]))
    spec = prepare.tokenizer_spec(make_tokenizer(), data, data.sources["books"])
    jobs = [ShardJob((Unit(path, "x.txt", "text", size=2**24),), Path(out) / path[-1]) for path in pipes]
    list(prepare._run(jobs, spec, 2))


def _children(pid):
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        found += [int(child) for child in task.read_text().split()]
    return found


def _working(pid):
    """Whether a process is a living tokenizing worker."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes()
        return b"longctx.data.worker" in words and Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="Linux tells a process's children")
def test_tokenizing_workers_die_with_the_process_that_started_them(tmp_path):
    pipes = [str(tmp_path / f"pipe{number}") for number in range(2)]
    for path in pipes:
        os.mkfifo(path)
    parent = multiprocessing.get_context("spawn").Process(target=_tokenize_pipes, args=(pipes, str(tmp_path)))
    parent.start()
    workers, ends = [], []
    try:
        for path in pipes:  # opens once a worker reads at the other end
            ends.append(_eventually(lambda path=path: _open_end(path)))
        workers = [pid for pid in _children(parent.pid) if _working(pid)]
        assert len(workers) == 2
        parent.kill()
        parent.join()
        _eventually(lambda: not any(map(_working, workers)))
    finally:
        parent.kill()
        for end in ends:
            os.close(end)


@pytest.mark.parametrize("how", ["file", pytest.param("stdin", marks=pytest.mark.slow)])
def test_workers_serve_a_script_without_a_main_guard(tmp_path, how):
    (tmp_path / "d").mkdir()
    for number in range(3):
        (tmp_path / "d" / f"{number}.txt").write_text(SCRIPT[:100] * 8000)
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(folder=str(tmp_path / "d"), cache=str(tmp_path / "c")))
    if how == "file":
        done = warm.python(str(script), cwd=tmp_path)
    else:
        done = subprocess.run(
            [sys.executable, "-"], input=script.read_text(), capture_output=True, text=True, timeout=250,
            check=False, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "3 shards by 2 workers\n"), done.stderr
    assert not [path for path in (tmp_path / "c").rglob("*") if ".partial" in path.name]


SCRIPT = """
import os
from pathlib import Path
from longctx.config.base import build
from longctx.config.data import DataConfig
from longctx.data import prepare, worker_pool
from transformers import AutoTokenizer

started = []
start = worker_pool._start_worker
worker_pool._start_worker = lambda workers: started.append(1) or start(workers)
data = build(DataConfig, {{"sources": {{"books": {{"kind": "text", "path": {folder!r}}}}},
                          "mixes": {{"m": {{"books": 1.0}}}}}}, origin="script")
tokenizer = AutoTokenizer.from_pretrained(Path(prepare.__file__).parents[1] / "assets" / "tiny")
shards, fresh = prepare.build_source("books", data, tokenizer, Path({cache!r}), workers=2)
print(f"{{len(shards)}} shards by {{len(started)}} workers")
"""


def _eventually(what, seconds=120):
    deadline = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return found


def _open_end(path):
    try:
        return os.open(path, os.O_WRONLY | os.O_NONBLOCK)
    except OSError:  # nobody reads yet
        return None


def test_worker_processes_write_what_one_process_writes(tmp_path, tokenizer, monkeypatch):
    from longctx.data import prepare

    (tmp_path / "d").mkdir()
    _write_books(tmp_path / "d", 30)
    monkeypatch.setattr(prepare, "SMALLEST_SHARD", 4000)
    config = _config(tmp_path / "d")
    alone, _ = build_source("books", config, tokenizer, tmp_path / "one", workers=1)
    monkeypatch.setattr(prepare, "_INLINE", 0)
    parallel, _ = build_source("books", config, tokenizer, tmp_path / "two", workers=2)
    assert [path.name for path in alone] == [path.name for path in parallel]
    for a, b in zip(alone, parallel, strict=True):
        for name in ("tokens.bin", "starts.npy", "names.bin", "buckets.npy"):
            assert (a / name).read_bytes() == (b / name).read_bytes()


@pytest.fixture
def shard(tmp_path):
    """A shard with every file that a shard can have."""
    from longctx.data.documents import Tally
    from longctx.data.shard import TokenizedDocument, write_shard

    rows = [
        TokenizedDocument(f"talk{n}", f"talk{n}", np.arange(30, dtype=np.uint16), np.arange(30, dtype=np.uint8) % 2)
        for n in range(6)
    ]
    write_shard(tmp_path / "shard", rows, np.uint16, masked=True, tally=Tally())
    return tmp_path / "shard"


FILES = ["tokens.bin", "mask.bin", "starts.npy", "names.npy", "names.bin", "buckets.npy"]


@pytest.mark.parametrize("name", FILES)
def test_a_changed_shard_is_noticed(shard, name):
    from longctx.data.shard import Shard

    assert sorted(path.name for path in shard.iterdir()) == sorted([*FILES, "meta.json"])
    whole = (shard / name).read_bytes()
    (shard / name).write_bytes(whole)  # the same content at another time is fine
    assert Shard(shard).name(3) == "talk3"
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    for changed in (flipped, whole[:-1]):
        (shard / name).write_bytes(changed)
        with pytest.raises(UserError, match=f"has changed since it was indexed .{name} should be.*delete that folder"):
            Shard(shard)
    (shard / name).unlink()
    with pytest.raises(UserError, match=f"{name} should be"):
        Shard(shard)


def test_a_shard_whose_meta_was_cut_is_refused(shard):
    from longctx.data.shard import Shard

    (shard / "meta.json").write_text((shard / "meta.json").read_text()[:40])
    with pytest.raises(UserError, match=r"meta\.json is no JSON.*delete that folder"):
        Shard(shard)


def test_all_of_a_shard_is_on_the_disk_before_its_meta_is_written(tmp_path, monkeypatch):
    """The order of the files and folders that fsync was called for, by their names in /proc."""
    synced = []
    real = os.fsync

    def fsync(descriptor):
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        if "shards" in path.parts:  # not the memo of file hashes
            synced.append((path.name, (path / "meta.json").exists() if path.is_dir() else None))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    (tmp_path / "d").mkdir()
    _write_books(tmp_path / "d", 3)
    shard = build_source("books", _config(tmp_path / "d"), make_tokenizer(), tmp_path, workers=1)[0][0]
    names = [name for name, _ in synced]
    assert sorted(names[:5]) == sorted(set(FILES) - {"mask.bin"})
    assert [exists for _, exists in synced[5:]] == [False, None, True, False]
    assert names[6] == "meta.json"
    assert names[5] == names[7] != "shards"
    assert names[8] == "shards"
    assert (shard / "meta.json").exists()


def test_useless_documents_are_skipped_and_an_empty_source_refused(tmp_path, tokenizer, capsys):
    folder = tmp_path / "d"
    folder.mkdir()
    (folder / "a.txt").write_text("real text here\n" * 200)
    (folder / "b.txt").write_text(" \n ")
    (folder / "c.txt").write_text("</s> <s>\n")
    (folder / "d.txt").write_bytes(b"\xff\xfe")
    (folder / "e.txt").write_text("a mark </s> inside a text is text\n" * 200)
    stage = _open(_config(folder, heldout=0.0), tokenizer, tmp_path / "c", sequences=2)
    assert "1 empty, 1 only special tokens, 1 not UTF-8" in capsys.readouterr().err
    tokens = np.concatenate([stage.sequence(i).tokens for i in range(2)])
    assert (tokens == tokenizer.eos_token_id).sum() <= 2
    for name in ("a.txt", "e.txt"):
        (folder / name).unlink()
    with pytest.raises(UserError, match=r"no usable document: of 3 records 1 are empty, 1 are only special"):
        _open(_config(folder), tokenizer, tmp_path / "c")


def test_a_document_of_which_the_tokenizer_keeps_nothing_is_empty(tmp_path, capsys):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE(vocab={"a": 0, "b": 1}, merges=[]))  # without <unk>, other characters are dropped
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    letters = PreTrainedTokenizerFast(tokenizer_object=backend)
    (tmp_path / "d").mkdir()
    (tmp_path / "d/a.txt").write_text("abba " * 40)
    (tmp_path / "d/b.txt").write_text("日本語")
    stage = _open(_config(tmp_path / "d", heldout=0.0), letters, tmp_path / "c", seq_len=64, sequences=2)
    assert "1 empty" in capsys.readouterr().err
    assert stage.stats()["sources"]["books"]["documents"] == 1
    assert stage.sequence(0).tokens.tolist() == [0, 1, 1, 0] * 16


def test_ids_above_the_number_of_tokens_are_stored_whole(tmp_path):
    """A tokenizer that has lost tokens has gaps; 2^16 + 4464 would become 4464 in two bytes."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1, "b": 70000}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    gaps = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]")
    (tmp_path / "d").mkdir()
    (tmp_path / "d/a.txt").write_text("a b b a " * 40)
    stage = _open(_config(tmp_path / "d", heldout=0.0), gaps, tmp_path / "c", seq_len=64, sequences=1)
    assert stage.sequence(0).tokens.tolist() == [0, 70000, 70000, 0] * 16


def test_broken_lines_beyond_the_allowed_share_are_an_error(tmp_path, tokenizer):
    folder = tmp_path / "d"
    folder.mkdir()
    rows = [json.dumps({"text": "some words " * 30})] * 50
    rows[20] = rows[20][:-4]
    (folder / "x.jsonl").write_text("\n".join(rows))
    with pytest.raises(UserError, match=r"1 of 50 records are broken, more than data.max_bad=0.01.*x.jsonl:21: "):
        _open(_config(folder), tokenizer, tmp_path / "c")
    assert len(_open(_config(folder, max_bad=0.05), tokenizer, tmp_path / "c", sequences=3)) == 3


def test_half_a_character_is_a_broken_record(tmp_path, tokenizer, capsys):
    folder = tmp_path / "d"
    folder.mkdir()
    rows = [json.dumps({"text": "some words " * 30})] * 50
    rows[20] = json.dumps({"text": "half \ud800 a character"})
    rows[30] = json.dumps({"text": ["a", "list"]})
    rows[40] = '{"text": ' + "[" * 100_000
    (folder / "x.jsonl").write_text("\n".join(rows))
    _open(_config(folder, max_bad=0.1), tokenizer, tmp_path / "c", sequences=3)
    said = capsys.readouterr().err
    assert "of 50 records 3 broken" in said
    assert "x.jsonl:21: " in said
    assert "x.jsonl:31: a list where text is expected" in said
    assert "x.jsonl:41: " in said


def test_a_missing_field_names_the_fields_there_are(tmp_path, tokenizer):
    folder = tmp_path / "d"
    folder.mkdir()
    (folder / "x.jsonl").write_text('{"body": "text"}\n' * 3)
    with pytest.raises(UserError, match=r"no field 'text' \(it has body\)"):
        _open(_config(folder), tokenizer, tmp_path / "c")


def test_what_does_not_fit_the_model_or_the_stage_is_refused(books, cache, tokenizer, capsys):
    folder, _ = books
    config = _config(folder)
    with pytest.raises(UserError, match=r"ids up to \d+ and the model has vocab_size=256"):
        _open(config, tokenizer, cache, vocab_size=256)
    with pytest.raises(UserError, match=r"stages.s512.mix=mm is not one of data.mixes; did you mean 'm'"):
        _open(config, tokenizer, cache, mix="mm")
    mix = {"books": {"weight": 1.0, "length": {"prolong": {"share": 0.9}}}}
    with pytest.raises(UserError, match="tokens are missing"):
        _open(_config(folder, mix), tokenizer, cache, seq_len=2**20)
    values = {"kind": "text", "path": str(folder), "min_len": "1M"}
    with pytest.raises(
        UserError, match=r"sources\.books: all \d+ documents are left out: .* min_len=1,048,576 keeps none"
    ):
        _open(_config(folder, sources={"books": values}), tokenizer, cache)
    capsys.readouterr()
    for _ in range(2):
        _open(_config(folder, max_epochs=2), tokenizer, cache, sequences=400)
    assert capsys.readouterr().err.count("more than data.max_epochs=2") == 1
    _open(_config(folder, max_epochs=1), tokenizer, cache, sequences=400, remarks=False)
    assert capsys.readouterr().err == ""


def test_ranks_other_than_the_first_do_not_repeat_its_warnings(books, cache, tokenizer, capsys, monkeypatch):
    from longctx import console

    monkeypatch.setattr(console, "_quiet", True)
    _open(_config(books[0], max_epochs=3), tokenizer, cache, sequences=500)
    assert "max_epochs" not in capsys.readouterr().err


def test_a_stage_of_padding_is_remarked_once(books, cache, tokenizer, capsys):
    mix = {"books": {"weight": 1.0, "length": {"cut": {"length": 300}}}}
    config = _config(books[0], mix, max_epochs=100)
    _open(config, tokenizer, cache, remarks=False)
    _open(config, tokenizer, cache, split="heldout")
    assert "padding" not in capsys.readouterr().err
    for _ in range(2):
        stage = _open(config, tokenizer, cache)
    said = f"stage s512: {stage.packing.padding:.0%} of its positions are padding, because documents of source books"
    assert capsys.readouterr().err.count(said) == 1


def test_a_task_that_does_not_fit_its_shortest_document_is_refused_at_opening(books, cache, tokenizer):
    task = {"kind": "needles", "count": 20, "questions": 1}
    sources = {
        "books": {"kind": "text", "path": str(books[0])},
        "needles": {"kind": "synth", "haystack": "books", "task": task},
    }
    mix = {"books": 0.2, "needles": {"weight": 0.8, "length": {"loguniform": {"min_len": 64}}}}
    with pytest.raises(UserError, match="take a longer length or a smaller count"):
        _open(_config(books[0], mix, sources=sources), tokenizer, cache)


def test_held_out_documents_too_short_for_the_policy_are_read_as_they_come(books, tmp_path, tokenizer, capsys):
    """The training documents satisfy the policy; the held-out documents do not have to."""
    folder = tmp_path / "d"
    folder.mkdir()
    _write_books(folder, 20)
    for number in range(6):
        (folder / f"long{number}.txt").write_text("apple river import return\n" * 2000)
    for length in ({"prolong": {"share": 0.75}}, {"upsample": {"min_len": 4096, "share": 0.5}}):
        config = _config(folder, {"books": {"weight": 1.0, "length": length}}, heldout=0.05)
        held = _corpus(config, tokenizer, tmp_path / "c", "heldout")
        assert 0 < held.lengths.max() < 4096
        stage = _open(config, tokenizer, tmp_path / "c", seq_len=4096, sequences=3)
        assert stage.packing.length.max() == 4096
        assert "held-out" not in capsys.readouterr().err
        stage = _open(config, tokenizer, tmp_path / "c", seq_len=4096, sequences=3, split="heldout", stage=str(length))
        assert len(stage) == 3
        assert {name.partition("@")[0] for i in range(3) for name in stage.documents(i)} == {
            f"books:{held.document_name(i)}" for i in range(len(held))
        }
        assert "natural lengths; raise data.heldout" in capsys.readouterr().err


def test_without_held_out_documents_there_is_no_held_out_loss(books, tmp_path, cache, tokenizer, capsys):
    folder, _ = books
    for mix in ({"books": 1.0}, {"needles": 1.0}):
        config = _config(folder, mix, heldout=0.0)
        stage = _open(config, tokenizer, cache, split="heldout", stage=f"none{len(str(mix))}")
        assert len(stage) == 0
        assert stage.stats()["padding"] == 0
        said = capsys.readouterr().err
        assert "raise data.heldout=0, or add documents, or set evaluate.heldout_sequences=0" in said
    (tmp_path / "one").mkdir()
    (tmp_path / "one/only.txt").write_text("a single document\n" * 50)
    sources = {
        "books": {"kind": "text", "path": str(folder)},
        "one": {"kind": "text", "path": str(tmp_path / "one")},
    }
    stage = _open(_config(folder, {"books": 0.5, "one": 0.5}, sources=sources), tokenizer, cache, split="heldout")
    assert len(stage) == 20
    assert {name.split(":")[0] for i in range(20) for name in stage.documents(i)} == {"books"}
    said = capsys.readouterr().err
    assert (
        "lacks a part of its mix, since too few documents are held out of one; it has 1 document in all, and 2 " in said
    )
    assert "raise" not in said


@pytest.mark.parametrize(
    ("texts", "share", "advice"),
    [
        (["a"], 0.9, "it has 1 document in all, and 2 are needed"),
        (["a", "b"], 0.0, "raise data.heldout=0"),
        (["a", "b"], 0.999, "data.heldout=0.999 would hold out all 2 documents, so none is; lower it"),
        (["a", "b"], 0.001, "raise data.heldout=0.001"),
    ],
)
def test_the_advice_for_more_held_out_documents_can_help(tmp_path, tokenizer, texts, share, advice):
    folder = tmp_path / "d"
    folder.mkdir()
    for text in texts:
        (folder / f"{text}.txt").write_text(f"{text} document\n" * 50)
    corpus = _corpus(_config(folder, heldout=share), tokenizer, tmp_path / "c", "heldout")
    assert corpus.hold_out_more(share).startswith(advice)


def test_every_stage_is_planned_before_the_first(books, cache, tokenizer):
    from dataclasses import dataclass

    from longctx.data.stage_opening import check_stages

    @dataclass
    class Stage:
        name: str
        seq_len: int
        mix: str = "m"
        steps: int = 4
        batch: int = 2

    mixes = {
        "m": {"books": 1.0},
        "long": {"books": {"weight": 1.0, "length": {"prolong": {"share": 0.5}}}},
    }
    config = _config(books[0], mixes=mixes)
    stages = [Stage("short", 256), Stage("far", 2**17, mix="long")]
    settings = {"tokenizer": tokenizer, "seed": 0, "cache": cache}
    check_stages(config, stages[:1], **settings)
    with pytest.raises(UserError, match=r"in stage far/train.*131,072 tokens and no document is that long"):
        check_stages(config, stages, **settings)
    with pytest.raises(UserError, match="vocab_size=100"):
        check_stages(config, stages[:1], vocab_size=100, **settings)


def test_what_a_stage_cuts_and_repeats_is_counted_once_from_its_plan(books, cache, tokenizer):
    stage = _open(_config(books[0]), tokenizer, cache, seq_len=256, sequences=60)
    packing, lengths = stage.packing, stage._corpora["books"].lengths
    whole = {int(d) for d in packing.document}
    cut = {int(d) for d, n in zip(packing.document, packing.length, strict=True) if n < lengths[d]}
    stats = stage.stats()
    assert 0 < len(cut) < len(whole)
    assert stats["cut"] == len(cut) / len(whole)
    assert stats["padding"] == packing.padding
    assert stats["epochs"] == {"books": packing.use["books"].epochs}
    assert stage.stats() is stats


def test_filters_by_length_need_no_new_tokens(books, cache, tokenizer):
    folder, _ = books
    values = {"kind": "text", "path": str(folder), "min_len": 200, "max_len": 600}
    config = _config(folder, sources={"books": values})
    _, fresh = build_source("books", config, tokenizer, cache)
    corpus = _corpus(config, tokenizer, cache)
    assert not fresh
    assert corpus.lengths.min() >= 200
    assert corpus.lengths.max() <= 600


def test_needles_in_a_stage_use_keys_of_their_split_and_its_own_straw(books, cache, tokenizer):
    import re

    from longctx.data.needle_keys import split_of

    folder, _ = books
    mix = {"needles": 1.0}
    for split, side in (("train", "train"), ("heldout", "eval")):
        stage = _open(_config(folder, mix), tokenizer, cache, split=split, sequences=12)
        pool = _open(_config(folder), tokenizer, cache, split=split, sequences=200)
        own = {name.removeprefix("books:").partition("@")[0] for i in range(200) for name in pool.documents(i)}
        for index in range(12):
            text = tokenizer.decode(stage.sequence(index).tokens)
            keys = re.findall(r"pass key of (\d{6})", text)
            assert len(keys) == 2
            assert {split_of(key) for key in keys} == {side}
            numbers = {f"book{n}.txt" for n in re.findall(r"^book (\d+)$", text, re.M)}
            assert numbers <= own


@pytest.mark.parametrize("bos", [True, False])
def test_synthetic_documents_begin_as_the_others_do(books, cache, tokenizer, bos):
    stage = _open(_config(books[0], {"books": 0.5, "needles": 0.5}, bos=bos), tokenizer, cache)
    seen = set()
    for index in range(len(stage)):
        sequence = stage.sequence(index)
        for name, first in zip(sequence.documents, sequence.tokens[sequence.boundaries[:-1]], strict=False):
            if "@" not in name:  # else a piece from within a document
                seen.add(name.partition(":")[0])
                assert (first == tokenizer.bos_token_id) == bos
    assert seen == {"books", "needles"}


def test_every_boundary_is_a_weightless_token_and_padding_is_small_text(books, cache, tokenizer):
    folder, _ = books
    stage = _open(_config(folder), tokenizer, cache, seq_len=4096, sequences=6)
    assert stage.stats()["padding"] < 0.1
    total = sum(use["tokens"] for use in stage.stats()["sources"].values())
    assert total == round(6 * 4096 * (1 - stage.stats()["padding"]))
