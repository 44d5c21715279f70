"""`longctx eval` of one model and of several: one table, one picture, kept results, marks, refusals, ranks."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from longctx.assets import tiny_model
from longctx.cli import main
from longctx.config.base import build
from longctx.config.compose import load
from longctx.config.data import DataConfig
from longctx.config.eval import EvalConfig, EvalModel, NeedleConfig
from longctx.errors import UserError
from longctx.eval.evaluate import EvalTasks, count_forwards, evaluate, window_of
from longctx.eval.heldout_text import open_heldout_text
from longctx.eval.loss import by_position, token_losses
from longctx.eval.needle import prompts
from longctx.eval.predict import load_plain
from longctx.eval.run import run, target_of
from longctx.verbs import VERBS
from tests.data.conftest import make_tokenizer
from tests.dist.ranks import forked
from tests.train.made import write_documents

TINY = str(tiny_model())
SMALL = [
    "data=text", "source=text", "data.heldout=0.4", "needle.lengths=[384,640]", "needle.per_cell=2", "needle.seeds=[1]",
    "loss_lengths=[128,640]", "loss_sequences=2",
]  # fmt: skip
THREE = f"models=[{{name: base, path: {TINY}}}, {{name: theta_only, path: {TINY}, theta: 1e6, window: 1024}}]"


def config(*words: str) -> EvalConfig:
    return load(VERBS["eval"], list(words))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides that name a folder of documents and a cache for their tokens."""
    folder = tmp_path_factory.mktemp("text")
    return [*SMALL, f"data.path={write_documents(folder / 'documents')}", f"cache={folder / 'cache'}"]


@pytest.fixture(scope="module")
def two(text: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """The results folder of an evaluation of two models, and its standard output and error."""
    out = tmp_path_factory.mktemp("out")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "160")
        said = _spoken(config(*text, THREE, f"out={out}"))
    return out, *said


def _spoken(settings: EvalConfig) -> tuple[str, str]:
    import contextlib
    import io

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        assert run(settings) == 0
    return out.getvalue(), err.getvalue()


@pytest.mark.parametrize("family", ["granite", "cohere"])
def test_a_family_that_scales_its_logits_is_refused(family: str):
    """Granite divides the output layer's logits and Cohere multiplies them, which token_losses does not."""
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = {"num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2}
    shape |= {"intermediate_size": 16, "vocab_size": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **shape))
    with pytest.raises(UserError, match=f"is a '{family}' model, and longctx trains llama"):
        token_losses(model, np.zeros((1, 4), np.int64))


def test_a_stored_loss_of_conversations_depends_on_which_of_them_are_read(tmp_path: Path):
    """Lengths that leave conversations out change what is measured, not the shards."""
    from transformers import AutoTokenizer

    from longctx.eval.conversations import open_heldout_chat

    talks = [[("user", "how many?"), ("assistant", "one " * count)] for count in (4, 40, 80)]
    rows = [{"messages": [{"role": role, "content": text} for role, text in talk]} for talk in talks]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    found = {}
    for limits in ({}, {"min_len": 40}, {"max_len": 150}):
        source = {"kind": "chat", "path": str(tmp_path / "chat.jsonl"), **limits}
        values = {"sources": {"chat": source, "text": {"kind": "stdlib"}}, "mixes": {"m": {"text": 1.0}}}
        data = build(DataConfig, values, origin="test")
        opened = open_heldout_chat(data, "chat", tmp_path / "tokenizer", tmp_path / "cache", longest=512, tokens=4096)
        found[opened.key] = len(opened.conversations)
    assert sorted(found.values()) == [2, 2, 3]


def test_models_are_named_in_a_list_a_mapping_or_one_by_one():
    listed = config("models=[A/base, {name: far, path: B, theta: 1e6, window: 8k}]").models
    mapped = config("models={base: A/base, far: {path: B, theta: 1e6, window: 8192}}").models
    dotted = config("models.base=A/base", "models.far.path=B", "models.far.theta=1e6", "models.far.window=8k").models
    assert listed == mapped == dotted
    assert list(listed or {}) == ["base", "far"]
    assert list(config("models=[runs/a/stages/s2048/model, runs/a/merged]").models or {}) == ["s2048", "merged"]


def test_without_a_folder_the_tables_end_with_how_to_keep_them(text, two):
    words = [*text, f"model.path={TINY}", "needle.lengths=[384]", "loss_lengths=[128]"]
    kept = "nothing of this is kept; out=FOLDER keeps the numbers and the picture"
    assert kept in _spoken(config(*words))[1]
    out, err = _spoken(config(*words, "format=json"))
    assert kept not in out + err + "".join(two[1:])
    assert json.loads(out)["window"] == 512


def test_two_models_stand_in_one_document_with_what_each_alone_would_give(text, two, tmp_path):
    document = json.loads((two[0] / "eval.json").read_text())["models"]
    assert list(document) == ["base", "theta_only"]
    assert document["base"]["window"] == 512
    assert document["theta_only"]["window"] == 1024
    assert document["theta_only"]["rope"]["rope_theta"] == 1e6
    assert document["base"]["loss"] != document["theta_only"]["loss"]
    assert run(config(*text, f"model.path={TINY}", f"out={tmp_path}")) == 0
    alone = json.loads((tmp_path / "eval.json").read_text())
    for part in ("loss", "loss_by_position", "window", "beyond_window"):
        assert alone[part] == document["base"][part]
    assert alone["needle"] == {**document["base"]["needle"], "label": "tiny"}
    for name in ("eval.png", "../" + two[0].name + "/eval.png"):
        assert (two[0] / name).read_bytes()[:4] == b"\x89PNG"


def test_the_tables_hold_every_model_and_mark_what_exceeds_its_window(two):
    out, err = two[1], two[2]
    document = json.loads((two[0] / "eval.json").read_text())["models"]
    for name, found in document.items():
        beyond = "*" if name == "base" else ""
        needles = [f"{100 * found['needle']['by_length'][n]:.1f}" for n in ("384", "640")]
        losses = [f"{found['loss'][n]:.4f}" for n in ("128", "640")]
        assert [name, needles[0], needles[1] + beyond, f"{100 * found['needle']['pooled']:.1f}"] in _rows(out)
        assert [name, losses[0], losses[1] + beyond] in _rows(out)
    ends = [found["loss_by_position"]["640"] for found in document.values()]
    assert ["257 to 512", *(f"{end['512']:.4f}" for end in ends)] in _rows(out)
    assert ["513 to 640", f"{ends[0]['640']:.4f}*", f"{ends[1]['640']:.4f}"] in _rows(out)
    assert document["base"]["beyond_window"] == [640]
    assert document["theta_only"]["beyond_window"] == []
    note = "base: 640 tokens exceed its window of 512 (config.json)"
    assert out.count(note) == err.count(note) == 1


def _rows(out: str) -> list[list[str]]:
    """The cells of every table's body."""
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in out.splitlines() if line[:1] == "│"]


def test_a_result_is_kept_until_its_own_model_or_question_changes(text, two):
    out = two[0]
    kept = {name: out / "models" / f"{name}.json" for name in ("base", "theta_only")}
    before = {name: path.stat().st_mtime_ns for name, path in kept.items()}
    document = (out / "eval.json").read_bytes()
    run(config(*text, THREE, f"out={out}"))
    assert {name: path.stat().st_mtime_ns for name, path in kept.items()} == before
    assert (out / "eval.json").read_bytes() == document
    said = _spoken(config(*text, THREE.replace("1e6", "2e6"), f"out={out}"))[1]
    assert kept["base"].stat().st_mtime_ns == before["base"]
    assert kept["theta_only"].stat().st_mtime_ns > before["theta_only"]
    assert "theta_only.json belongs to another model" in said
    assert f"base: measured before with the same questions and text, and kept ({out}/models)" in said
    whole = kept["base"].read_text()
    kept["base"].write_text(whole[:40])  # as an interrupted copy leaves it
    assert (
        "base.json belongs to another model, other needles or other text, or is damaged; measuring it again"
        in (_spoken(config(*text, THREE, f"out={out}"))[1])
    )
    assert kept["base"].read_text() == whole


def test_lengths_beyond_the_machine_s_memory_are_said_before_anything_is_read(text, tmp_path, monkeypatch, capsys):
    """A config.json of 8B parameters without weights stands for a large model; the machine has 64 GiB."""
    from longctx.distributed import ranks as worlds
    from longctx.eval import memory
    from tests.launch.test_submit import make_model

    make_model(tmp_path)
    values = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
              "intermediate_size": 14336, "vocab_size": 128256, "head_dim": 128}  # fmt: skip
    written = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**written, **values}))
    monkeypatch.setattr(memory, "host_memory", lambda: 64.0 * 2**30)
    asked = config(*text, f"model.path={tmp_path}", "needle.lengths=[4096,524288]", "loss_lengths=[4096,524288]")
    memory.remark_memory(asked, "large", str(tmp_path), worlds.alone("cpu"))
    said = " ".join(capsys.readouterr().err.split())
    assert "large: needle.lengths asks for 524,288 tokens, 2 at once, which need about" in said
    assert "'needle.lengths=[4096]' 'loss_lengths=[4096]' would fit" in said
    monkeypatch.setattr(memory, "host_memory", lambda: 4096.0 * 2**30)
    memory.remark_memory(asked, "large", str(tmp_path), worlds.alone("cpu"))
    assert capsys.readouterr().err == ""


def test_the_bar_counts_prompts_and_held_out_sequences_of_every_rank(text):
    """The loss of long sequences takes as long as the needles, and a full bar would stand through all of it."""
    asked = config(*text, f"model.path={TINY}")
    tasks, target = EvalTasks(asked.needle, asked.loss_lengths, 3), target_of(asked, "base", EvalModel(path=TINY))
    heldout = open_heldout_text(asked.data, asked.source, TINY, Path(asked.cache))
    ticks: list[int] = []
    evaluate(target, tasks, heldout, None, tick=lambda: ticks.append(1))
    assert len(ticks) == count_forwards(target, tasks, heldout, None) == 4 + 2 * 3
    assert count_forwards(target, tasks, heldout, None, world=2) == 2 + 2 * 2


@pytest.mark.parametrize("kind", ["text", "chat"])
def test_prompts_begin_as_the_documents_of_training_do(tmp_path, kind):
    """A kept result belongs to one kind of prompt, also where the haystack's own tokens are the same for both."""
    from transformers import AutoTokenizer

    talks = [[{"role": "user", "content": "how many? " * 400}, {"role": "assistant", "content": "one"}]] * 3
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    path = write_documents(tmp_path / "documents") if kind == "text" else tmp_path / "chat.jsonl"
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    asked, keys = NeedleConfig(lengths=(384,), per_cell=1), set()
    for bos in (True, False):
        values = {"sources": {"s": {"kind": kind, "path": str(path)}}, "mixes": {"m": {"s": 1.0}}, "bos": bos}
        data = build(DataConfig, values, origin="test")
        heldout = open_heldout_text(data, "s", tmp_path / "tokenizer", tmp_path / "cache")
        keys.add(heldout.key)
        for prompt in prompts(asked, heldout.writer, heldout.haystack):
            assert (prompt.document.tokens[0] == heldout.writer.bos) == bos
    assert len(keys) == 2


def run_until(ended: threading.Event, wanted) -> None:
    """Evaluate, and set the event at the end."""
    try:
        run(wanted)
    finally:
        ended.set()


def test_an_interrupted_evaluation_goes_on_with_the_model_it_was_at(text, two, tmp_path):
    """Ctrl-C as soon as the first model's result is kept."""
    kept, more = tmp_path / "models" / "base.json", "needle.per_cell=10"

    ended = threading.Event()

    def interrupt() -> None:
        while not kept.exists():
            time.sleep(0.002)
        while not ended.is_set():  # Python drops an exception that a signal raises inside a destructor
            os.kill(os.getpid(), signal.SIGINT)
            ended.wait(0.2)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        run_until(ended, config(*text, THREE, more, f"out={tmp_path}"))
    assert [path.name for path in tmp_path.iterdir()] == ["models"]
    assert [path.name for path in kept.parent.iterdir()] == ["base.json"]
    before = kept.stat().st_mtime_ns
    run(config(*text, THREE, more, f"out={tmp_path}"))
    assert kept.stat().st_mtime_ns == before
    document = json.loads((tmp_path / "eval.json").read_text())["models"]
    assert np.sum(document["theta_only"]["needle"]["asked"]) == 2 * 5 * 10
    assert document["base"]["loss"] == json.loads((two[0] / "eval.json").read_text())["models"]["base"]["loss"]


def test_loss_by_position_is_the_mean_of_each_doubling_bucket():
    losses = np.arange(2, 301, dtype=np.float32)[None].repeat(3, 0)  # the loss at position p is p
    means = by_position(losses)
    assert list(means) == [64, 128, 256, 300]
    assert list(means.values()) == [np.mean(np.arange(a, b)) for a, b in ((2, 65), (65, 129), (129, 257), (257, 301))]
    assert by_position(losses[:, :39]) == {40: 21.0}


def other_model(folder: Path) -> Path:
    """A random model of another family with a tokenizer of its own."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    tokenizer = make_tokenizer()
    shape = Qwen2Config(
        vocab_size=640, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=2048,
    )  # fmt: skip
    Qwen2ForCausalLM(shape).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_models_of_different_tokenizers_are_asked_in_their_own(text, tmp_path, capfd):
    other = other_model(tmp_path / "other")
    capfd.readouterr()
    words = ["needle.lengths=[448]", "loss_lengths=[64]", "format=json"]
    assert run(config(*text, f"models={{base: {TINY}, other: {other}}}", *words)) == 0
    printed, said = capfd.readouterr()
    found = json.loads(printed)["models"]
    assert np.sum(found["other"]["needle"]["asked"]) == np.sum(found["base"]["needle"]["asked"]) == 10
    assert found["base"]["loss"]["64"] < 4 < found["other"]["loss"]["64"]  # one is trained, the other guesses
    assert said.count("the models have different tokenizers") == 1


def test_another_rope_has_the_window_it_serves():
    models = config(f"models={{a: {{path: {TINY}, rope: {{rope_type: yarn, factor: 4}}}}}}").models or {}
    target = target_of(config(f"models.a={TINY}"), "a", models["a"])
    assert target.window == 2048
    assert target.rope == {
        "rope_type": "yarn", "rope_theta": 10000, "factor": 4, "original_max_position_embeddings": 512
    }  # fmt: skip
    model = load_plain(TINY, target.rope, target.window)
    own = load_plain(TINY)
    assert window_of(model) == 2048
    assert window_of(own) == 512
    inv_freq = [found.model.rotary_emb.inv_freq for found in (model, own)]
    assert inv_freq[0][0] == inv_freq[1][0]
    assert inv_freq[0][-1] == pytest.approx(inv_freq[1][-1] / 4)


def test_a_window_that_is_asked_for_holds_for_a_yarn_model_too(text, tmp_path):
    """Its config.json says what yarn serves, 2,048 tokens, whatever max_position_embeddings is."""
    yarn = tmp_path / "yarn"
    shutil.copytree(TINY, yarn)
    values = json.loads((yarn / "config.json").read_text())
    values |= {"rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0}, "rope_scaling": None}
    (yarn / "config.json").write_text(json.dumps(values))
    few = ["needle.lengths=[600]", "needle.per_cell=1", "loss_lengths=[64]", "loss_sequences=1", "format=json"]
    asked = f"models=[{{name: served, path: {yarn}}}, {{name: asked, path: {yarn}, window: 512}}]"
    found = json.loads(_spoken(config(*text, *few, asked))[0])["models"]
    assert {name: (one["window"], one["beyond_window"]) for name, one in found.items()} == {
        "served": (2048, []), "asked": (512, [600]),
    }  # fmt: skip


WRONG: dict[str, tuple[list[str], str]] = {
    "nothing given": ([], r"model.path is missing"),
    "both given": ([f"model.path={TINY}", f"models=[{TINY}]"], r"model and models are both given"),
    "no such model": ([f"models={{a: {TINY}, b: ./nowhere}}"], r"models\.b\.path=\./nowhere does not exist"),
    "one name twice": ([f"models=[{TINY},{TINY}]"], r"models=.* holds two models named 'tiny' .* give names"),
    "no path": (["models={a: {theta: 5}}"], r"models\.a\.path is missing"),
    "an unknown key": (
        [f"models={{a: {{path: {TINY}, thta: 5}}}}"],
        r"models.a.thta is not a known key; did you mean models.a.theta",
    ),
    "an unknown rope": ([f"models={{a: {{path: {TINY}, rope: {{rope_type: yarnn}}}}}}"], r"'yarnn' is not one longctx"),
    "a rope without its factor": (
        [f"models={{a: {{path: {TINY}, rope: {{rope_type: linear}}}}}}"],
        r"factor is missing: rope_type='linear' needs it.*models\.a\.rope",
    ),
    "a name that is no file's": (["models={../a: A}"], r"'\.\./a' names files and titles"),
    "no such source": (
        [f"model.path={TINY}", "source=txt"],
        r"source=txt is not a source of text in data\.sources; did you mean 'text'",
    ),
    "too little text": (
        [f"model.path={TINY}", "needle.lengths=[1M]"],
        r"lengths reach 1,048,576 tokens and source=text",
    ),
    "too short for needles": (
        [f"model.path={TINY}", "needle.lengths=[100]"],
        r"^needle\.lengths: a needles task with 5 lines",
    ),
    "a length twice": ([f"model.path={TINY}", "needle.lengths=[512,512]"], r"must be different numbers"),
}


@pytest.mark.parametrize("mistake", WRONG)
def test_a_mistake_is_refused_in_one_paragraph(text: list[str], mistake: str):
    words, message = WRONG[mistake]
    with pytest.raises(UserError, match=message) as refusal:
        run(config(*text, *words))
    assert "\n" not in str(refusal.value)


def test_a_tokenizer_that_exceeds_the_model_is_refused(text, tmp_path):
    other = other_model(tmp_path / "other")
    with pytest.raises(UserError, match=r"models\.base\.tokenizer=.*ids up to 599 and the model has vocab_size=512"):
        run(config(*text, f"models={{base: {{path: {TINY}, tokenizer: {other}}}}}"))


def test_ranks_under_srun_find_together_what_one_finds(text, two, tmp_path):
    """Only srun's variables are set, as in a Slurm step; the ranks share prompts and windows, rank 0 writes."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    step = {
        "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_STEP_NODELIST": "localhost",
        "SLURM_JOB_ID": "7", "MASTER_PORT": port, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    words = ["eval", *text, THREE, f"out={tmp_path}", "format=json"]
    ranks = [
        forked(main, words, log=tmp_path / f"rank{rank}", **step, SLURM_PROCID=str(rank), SLURM_LOCALID=str(rank))
        for rank in (0, 1)
    ]
    for rank in ranks:
        rank.join(280)
    said = [[(tmp_path / f"rank{rank}.{name}").read_text() for name in ("out", "err")] for rank in (0, 1)]
    assert [rank.exitcode for rank in ranks] == [0, 0], said
    printed = json.loads(said[0][0])
    assert printed == json.loads((tmp_path / "eval.json").read_text())
    assert said[1][0] == ""
    one = json.loads((two[0] / "eval.json").read_text())["models"]
    base, together = one["base"], printed["models"]["base"]
    assert together["needle"] == base["needle"]
    assert together["loss"] == pytest.approx(base["loss"], rel=1e-6)
    assert together["loss_by_position"]["640"] == pytest.approx(base["loss_by_position"]["640"], rel=1e-6)
