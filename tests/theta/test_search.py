"""A search on a tiny random model: plain losses, two ranks equal one, resuming, and a curriculum with the result."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from longctx.cli import main
from longctx.config.base import build
from longctx.config.compose import compose
from longctx.config.curriculum import CurriculumConfig
from longctx.config.model import InitConfig, MemoryConfig
from longctx.curriculum import resolve
from longctx.errors import UserError
from longctx.theta.search_data import long_documents
from tests.started import longctx

ASSET = Path(__file__).parents[2] / "longctx" / "assets" / "tiny"
ROPE = {"rope_type": "default", "rope_theta": 10000}


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer model of window 64 beside the tiny tokenizer."""
    from transformers import AutoTokenizer

    from longctx.model import init_from

    folder = tmp_path_factory.mktemp("model")
    tokenizer = AutoTokenizer.from_pretrained(ASSET)
    shape = InitConfig(layers=2, hidden=32, heads=2, kv_heads=1, ffn=48, vocab=len(tokenizer), window=64, seed=1)
    init_from(shape, attention="sdpa").save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ASSET / name, folder / name)
    return folder


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    rng = np.random.default_rng(0)
    words = ["the", "key", "of", "a", "long", "road", "turns", "where", "no", "one", "reads", "the", "map"]
    for number in range(12):
        lines = [" ".join(rng.choice(words, size=8)) for _ in range(60)]
        (folder / f"{number}.txt").write_text("\n".join(lines))
    return folder


def words(model: Path, text: Path, out: Path, *more: str) -> list[str]:
    return [
        "theta", "search=true", f"model.path={model}", "data=text", f"data.path={text}", "+data.heldout=0.4",
        "to=512", "rule=ntk", f"run_dir={out}", "trials.documents=2", "trials.needles=1", "trials.points=3",
        "trials.rounds=1", "trials.attempts=1", "format=json", *more,
    ]  # fmt: skip


@pytest.fixture(scope="session")
def searched(model_folder: Path, text_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("search")
    assert main(words(model_folder, text_folder, out)) == 0
    return out


def trials_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "trials-s512.jsonl").read_text().splitlines()]


def test_every_trial_is_written_and_the_best_chosen(searched: Path):
    trials = trials_of(searched)
    assert len({t["theta"] for t in trials}) == len(trials) >= 4
    assert {t["phase"] for t in trials} >= {"grid", "golden"}
    score = {t["theta"]: t["last_quarter_loss"] + 0.25 * t["needle_loss"] for t in trials}
    best = min(score, key=lambda theta: (score[theta], theta))
    assert f'"theta": {best}' in (searched / "theta.yaml").read_text()
    assert min(score) >= 10000
    assert (searched / "search-s512.png").read_bytes()[:4] == b"\x89PNG"


def test_a_curriculum_reads_the_chosen_theta(searched: Path):
    values = compose("theta", ["curriculum=tiny_16x", f"curriculum.theta_file={searched / 'theta.yaml'}"])
    values["curriculum"]["stages"] = {"s512": {"seq_len": 512, "steps": 4, "batch": 1}}
    config = build(CurriculumConfig, values["curriculum"], origin="test")
    stage = resolve(config, head_dim=16, rope=ROPE, window=64, file="test")[0]
    assert f'"theta": {stage.theta}' in (searched / "theta.yaml").read_text()


def test_searches_of_two_stages_at_once_both_keep_their_theta(tmp_path: Path):
    """Each writes its stage into the same file, many times over; a real search does so at its end."""
    code = (
        "import sys; from pathlib import Path; from longctx.theta.search_result import SearchResult, write_override\n"
        "from longctx.theta.trials import Trial\n"
        "for number in range(15):\n"
        "    best = Trial(20000 + number, 1.0, None, 'grid', 0.1)\n"
        "    result = SearchResult(f'{sys.argv[1]}{number}', 512, best, best, None, [best])\n"
        "    write_override(Path('theta.yaml'), result, 'ntk', 'm')\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    both = [
        subprocess.Popen([sys.executable, "-c", code, name], cwd=tmp_path, env=environment, stderr=subprocess.PIPE)
        for name in "ab"
    ]
    assert [life.wait() for life in both] == [0, 0]
    stages = yaml.safe_load((tmp_path / "theta.yaml").read_text())["stages"]
    entry = {"rule": "ntk", "seq_len": 512, "model": "m"}
    assert stages == {f"{name}{n}": {"theta": 20000 + n, **entry} for name in "ab" for n in range(15)}


def test_a_theta_file_keeps_no_theta_of_another_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    from longctx.theta.search_result import SearchResult, write_override
    from longctx.theta.trials import Trial

    best, path = Trial(20000, 1.0, None, "grid", 0.1), tmp_path / "theta.yaml"
    path.write_text("stages:\n  s256: {theta: 11000}\n")  # written by hand
    for stage, model in (("s512", "a"), ("s1024", "a"), ("s2048", "b")):
        write_override(path, SearchResult(stage, int(stage[1:]), best, best, None, [best]), "ntk", model)
    assert list(yaml.safe_load(path.read_text())["stages"]) == ["s256", "s2048"]
    assert "s512, s1024 left out, whose theta was found for another model" in capsys.readouterr().err


def test_a_theta_of_another_length_is_refused(searched: Path):
    values = compose("theta", ["curriculum=tiny_16x", f"curriculum.theta_file={searched / 'theta.yaml'}"])
    values["curriculum"]["stages"] = {"s512": {"seq_len": 1024, "steps": 4, "batch": 1}}
    config = build(CurriculumConfig, values["curriculum"], origin="test")
    with pytest.raises(UserError, match=r"searched at 512 tokens and the stage has seq_len=1024"):
        resolve(config, head_dim=16, rope=ROPE, window=64, file="test")


def test_it_resumes_from_the_last_whole_line(
    searched: Path, model_folder: Path, text_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    shutil.copytree(searched, tmp_path / "again")
    file = tmp_path / "again" / "trials-s512.jsonl"
    before = trials_of(searched)
    file.write_text("\n".join(file.read_text().splitlines()[:-1]) + '\n{"key": "cut o')
    assert main(words(model_folder, text_folder, tmp_path / "again")) == 0
    printed = capsys.readouterr()
    assert "the last line is incomplete" in printed.err
    after = trials_of(tmp_path / "again")
    assert [t["seconds"] for t in after[:-1]] == [t["seconds"] for t in before[:-1]]
    assert after[-1]["theta"] == before[-1]["theta"]
    assert after[-1]["last_quarter_loss"] == before[-1]["last_quarter_loss"]
    assert json.loads(printed.out)["best"]["theta"] in {t["theta"] for t in after}


def test_two_ranks_find_what_one_does(searched: Path, model_folder: Path, text_folder: Path, tmp_path: Path):
    done = longctx(*words(model_folder, text_folder, tmp_path / "two", "nproc=2"))
    assert done.returncode == 0, done.stderr
    for one, two in zip(trials_of(searched), trials_of(tmp_path / "two"), strict=True):
        assert one["theta"] == two["theta"]
        assert two["last_quarter_loss"] == pytest.approx(one["last_quarter_loss"], rel=1e-5)
        assert two["needle_loss"] == pytest.approx(one["needle_loss"], rel=1e-5)


def test_trials_of_other_weights_of_the_same_size_are_not_used(
    searched: Path, model_folder: Path, text_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    from safetensors.torch import load_file, save_file

    shutil.copytree(searched, tmp_path / "again")
    other = shutil.copytree(model_folder, tmp_path / "model")
    weights = load_file(other / "model.safetensors")
    size = (other / "model.safetensors").stat().st_size
    save_file({k: w * 1.5 for k, w in weights.items()}, other / "model.safetensors", metadata={"format": "pt"})
    assert (other / "model.safetensors").stat().st_size == size
    assert main(words(other, text_folder, tmp_path / "again")) == 0
    before, after = trials_of(searched), trials_of(tmp_path / "again")
    assert f"{len(before)} trials of another model, text, stage or setting are ignored" in capsys.readouterr().err
    assert after[0]["theta"] == after[len(before)]["theta"]
    assert after[0]["last_quarter_loss"] != after[len(before)]["last_quarter_loss"]


def test_other_texts_under_the_same_path_belong_to_other_trials(text_folder: Path, model_folder: Path, tmp_path: Path):
    from transformers import AutoTokenizer

    from longctx.config.data import DataConfig
    from longctx.config.theta import SearchConfig
    from longctx.theta.search_data import load_search_data
    from longctx.theta.search_work import _contents

    folder = tmp_path / "texts"
    values = {"sources": {"s": {"kind": "text", "path": str(folder)}}, "mixes": {"m": {"s": 1.0}}, "heldout": 0.4}
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    found = []
    for change in ("", "", "other words\n"):
        shutil.copytree(text_folder, folder, dirs_exist_ok=True)
        for file in folder.glob("*.txt"):
            file.write_text(change + file.read_text())
        data = load_search_data(
            build(DataConfig, values, origin="test"), "m", tokenizer,
            length=512, trials=SearchConfig(documents=2, needles=1), cache=tmp_path / "tokens",
        )  # fmt: skip
        found.append(_contents(data, []))
    assert found[0] == found[1] != found[2]


def test_needles_begin_as_the_documents_of_the_data_do(text_folder: Path, model_folder: Path, tmp_path: Path):
    from transformers import AutoTokenizer

    from longctx.config.data import DataConfig
    from longctx.config.theta import SearchConfig
    from longctx.theta.search_data import load_search_data

    values = {"sources": {"s": {"kind": "text", "path": str(text_folder)}}, "mixes": {"m": {"s": 1.0}}, "heldout": 0.4}
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    for bos in (True, False):
        data = load_search_data(
            build(DataConfig, {**values, "bos": bos}, origin="test"), "m", tokenizer,
            length=512, trials=SearchConfig(documents=2, needles=1), cache=tmp_path / "tokens",
        )  # fmt: skip
        assert (data.needles[0].tokens[0] == tokenizer.bos_token_id) == bos


@pytest.mark.parametrize("change", [{"dtype": "float64"}, {"rotary": "float64"}, {"tokenizer": str(ASSET)}])
def test_tokenizer_and_precision_belong_to_a_trial(model_folder: Path, tmp_path: Path, change: dict):
    from longctx.config.data import DataConfig
    from longctx.config.model import ModelConfig
    from longctx.config.theta import ThetaConfig
    from longctx.theta.inputs import starting_rope, target_stages
    from longctx.theta.search import job_of
    from longctx.theta.search_work import _key

    def key(**values: str) -> str:
        data = build(
            DataConfig, {"sources": {"s": {"kind": "stdlib"}}, "mixes": {"default": {"s": 1.0}}}, origin="test"
        )
        config = ThetaConfig(model=ModelConfig(path=str(model_folder), **values), to=512, search=True, data=data)
        rope = starting_rope(config)
        return _key(job_of(config, rope, target_stages(config, rope)[0]), "the texts")

    assert key() == key()
    assert key(**change) != key()


def test_the_override_names_the_rule_and_training_keeps_its_scaling(
    model_folder: Path, text_folder: Path, tmp_path: Path
):
    given = [word for word in words(model_folder, text_folder, tmp_path) if word != "rule=ntk"]
    assert main([*given, "rule=yarn", "trials.rounds=0", "trials.attempts=0"]) == 0
    file = tmp_path / "theta.yaml"
    assert '"rule": "yarn"' in file.read_text()
    curriculum = {"stages": {"s512": {"seq_len": 512, "steps": 4, "batch": 1}}, "rule": "yarn", "lr": {"peak": 1e-3}}
    config = build(CurriculumConfig, {**curriculum, "theta_file": str(file)}, origin="test")
    stage = resolve(config, head_dim=16, rope=ROPE, window=64, file="test")[0]
    assert (stage.rope["rope_type"], stage.rope["factor"]) == ("yarn", 8.0)
    assert f'"theta": {stage.theta}' in file.read_text()


@pytest.fixture
def objective(model_folder: Path):
    from longctx.attention import ContextParallel
    from longctx.distributed.ranks import Ranks
    from longctx.model import load
    from longctx.theta.objective import Objective

    context = ContextParallel.from_world()
    ranks = Ranks(0, 1, 0, 1, torch.device("cpu"))
    yield Objective(load(str(model_folder)), MemoryConfig(), context, ranks)
    context.close()


def material(seed: int, length: int = 256):
    from longctx.theta.search_data import SearchData, WeightedSequence

    rng = np.random.default_rng(seed)
    tail = (np.arange(length) >= length * 3 // 4).astype(np.float32)
    few = np.zeros(length, np.float32)
    few[[40, 200]] = 1.0
    tokens = [rng.integers(5, 400, length) for _ in range(3)]
    return SearchData(
        [WeightedSequence(tokens[0], tail), WeightedSequence(tokens[1], tail)], [WeightedSequence(tokens[2], few)]
    )


def test_losses_are_plain_transformers(objective, model_folder: Path):
    from transformers import AutoConfig, AutoModelForCausalLM

    given = material(3)
    config = AutoConfig.from_pretrained(model_folder)
    config.rope_parameters, config.max_position_embeddings = {**ROPE, "rope_theta": 77777}, 256
    plain = AutoModelForCausalLM.from_pretrained(model_folder, config=config, attn_implementation="eager")

    def mean(sequences: list) -> float:
        total, weight = 0.0, 0.0
        for sequence in sequences:
            tokens = torch.from_numpy(sequence.tokens)
            with torch.no_grad():
                scores = plain(tokens[None]).logits[0, :-1].log_softmax(-1)
            nll = -scores.gather(-1, tokens[1:, None]).squeeze(-1).numpy()
            total += float((nll * sequence.weights[1:]).sum())
            weight += float(sequence.weights[1:].sum())
        return total / weight

    text, needle = objective.losses({**ROPE, "rope_theta": 77777}, given)
    assert text == pytest.approx(mean(given.texts), rel=1e-5)
    assert needle == pytest.approx(mean(given.needles), rel=1e-5)


@pytest.fixture
def packed(text_folder: Path, model_folder: Path, tmp_path: Path) -> Any:
    """Sequences of 256 tokens, each of several documents' pieces."""
    from longctx.config.data import DataConfig
    from longctx.data import open_stage_data
    from longctx.data.tokenizer import tokenizer_at

    part = {"weight": 1.0, "length": {"cut": {"length": 64}}}
    given = {"sources": {"s": {"kind": "text", "path": str(text_folder)}}, "mixes": {"m": {"s": part}}}
    data = open_stage_data(
        build(DataConfig, given, origin="test"), mix="m", seq_len=256, sequences=6, seed=0, split="train",
        tokenizer=tokenizer_at(model_folder, "model.path"), cache=tmp_path, stage="s256",
    )  # fmt: skip
    assert all(len(data.boundaries(index)) > 3 for index in range(6))
    return data


def adaptation(objective: Any, packed: Any, lr: float, indices: Sequence[int] = range(6)) -> Any:
    from longctx.theta.objective import Adaptation
    from longctx.train.batch import micro_batch

    return Adaptation([micro_batch(packed, [index], objective.cp, "zigzag") for index in indices], lr)


def test_adaptation_lowers_the_loss_and_is_undone(objective, packed):
    from longctx.theta.search_data import SearchData, WeightedSequence

    shown = packed.sequence(0)
    given = SearchData([WeightedSequence(shown.tokens.astype(np.int64), shown.weights)], [])
    before = {name: p.detach().clone() for name, p in objective.hf.named_parameters()}
    plain = objective.losses(ROPE, given)
    for layer in objective.hf.model.layers:  # a config.json's; training is without it
        layer.self_attn.attention_dropout = 0.5
    adapted = objective.losses(ROPE, given, adaptation(objective, packed, 3e-3))
    assert adapted[0] < plain[0] - 0.05
    assert all(torch.equal(before[name], p) for name, p in objective.hf.named_parameters())
    assert objective.losses(ROPE, given) == plain


def test_adaptation_is_a_training_step_within_documents(objective, packed, model_folder: Path):
    """One step is AdamW's on the mean loss of documents that do not see each other, clipped to norm 1."""
    from longctx.model import load

    plain = load(str(model_folder), attention="eager")
    sequence = packed.sequence(1)
    total, weight = torch.zeros(()), float(sequence.weights.sum())
    for first, past in itertools.pairwise(sequence.boundaries.tolist()):
        tokens = torch.from_numpy(sequence.tokens[first:past].astype(np.int64))
        scores = plain(tokens[None]).logits[0, :-1].log_softmax(-1)
        nll = -scores.gather(-1, tokens[1:, None]).squeeze(-1)
        total = total + (nll * torch.from_numpy(sequence.weights[first + 1 : past])).sum()
    (total / weight).backward()
    torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
    torch.optim.AdamW(plain.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0).step()
    with objective._adapted(adaptation(objective, packed, 1e-3, [1])):
        for (name, ours), theirs in zip(objective.hf.named_parameters(), plain.parameters(), strict=True):
            assert ours.detach().numpy() == pytest.approx(theirs.detach().numpy(), abs=2e-5), name


def test_small_steps_of_bfloat16_weights_add_up(objective, packed):
    """Without masters in fp32 most of such steps would be rounded away."""
    moved = []
    for kind in (torch.float32, torch.bfloat16):
        objective.hf.to(kind)
        before = [p.detach().float().clone() for p in objective.hf.parameters()]
        with objective._adapted(adaptation(objective, packed, 2e-5)):
            after = [p.detach().float().clone() for p in objective.hf.parameters()]
        moved.append(sum(float((a - b).sum().abs()) for a, b in zip(after, before, strict=True)))
    assert moved[1] == pytest.approx(moved[0], rel=0.2)


def test_mistakes(model_folder: Path, text_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    chats = tmp_path / "chats.jsonl"
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    chats.write_text((json.dumps({"messages": turns}) + "\n") * 50)
    for more, message in (
        (["trials.stage=s51"], "trials.stage='s51' is no stage; did you mean 's512'?"),
        (["trials.bracket=1"], "trials: bracket=1 must be above 1"),
        (["to=1M"], "too few for documents of 1048576"),
        (["data=chat", f"data.path={chats}"], "data.mixes.default holds no text"),
        (["nproc=0"], "nproc=0 must be 1 or more"),
    ):
        given = [w for w in words(model_folder, text_folder, tmp_path / "x") if not w.startswith(("data=", "+data"))]
        if "data=chat" in more:
            given = [w for w in given if not w.startswith("data.path=")]
        data = [] if "data=chat" in more else ["data=text"]
        assert main([*given, *data, *more]) == 2, message
        err = capsys.readouterr().err
        assert message.split("trials: ")[-1] in err
        assert "Traceback" not in err


def test_the_bench_searches_again_when_the_search_has_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """And begins without the override file of a search that was interrupted: its thetas would move the brackets."""
    from longctx.bench.theta import search_all
    from longctx.config.bench_theta import BenchThetaConfig
    from longctx.rope import read_rope

    began: list[str] = []
    file = tmp_path / "search" / "theta.yaml"

    def run_search(job) -> None:
        began.append(f"{job.trials.stage} after {file.read_text().split() if file.exists() else []}")
        file.parent.mkdir(exist_ok=True)
        with file.open("a") as stream:
            stream.write("" if stream.tell() else "stages:\n")
            stream.write(f"  {job.trials.stage}: {{theta: 1000000, rule: dynamic-ntk}}\n")

    monkeypatch.setattr("longctx.theta.search.job_of", lambda job, rope, stages: job)
    monkeypatch.setattr("longctx.theta.search_work.run_search", run_search)
    config = build(BenchThetaConfig, compose("bench_theta", []), origin="test")
    rope = read_rope(str(ASSET))
    for _ in range(2):
        assert search_all(config, tmp_path, rope) == file
    assert [line.partition(" ")[0] for line in began] == ["s2048", "s8192"]
    search_all(replace(config, trials=replace(config.trials, documents=9)), tmp_path, rope)
    assert began[2:] == began[:2]
    assert began[0] == "s2048 after []"


@pytest.mark.parametrize("kept", ["stages:\n", "stages: {s256: 11000}\n"])
def test_a_theta_file_written_by_hand_is_no_obstacle(tmp_path: Path, kept: str):
    """A search takes hours; what else is in the file does not end it."""
    from longctx.theta.search_result import SearchResult, write_override
    from longctx.theta.trials import Trial

    best, path = Trial(20000, 1.0, None, "grid", 0.1), tmp_path / "theta.yaml"
    path.write_text(kept)
    write_override(path, SearchResult("s512", 512, best, best, None, [best]), "ntk", "a")
    assert yaml.safe_load(path.read_text())["stages"]["s512"]["theta"] == 20000


def test_long_documents_give_other_parts_before_a_sequence_is_read_twice():
    """Two documents were asked for four sequences: each beginning was read twice, and said to be joined."""
    lengths = np.array([1000, 1200])

    def read(document: int, start: int, count: int) -> np.ndarray:
        return np.arange(document * 10_000 + start, document * 10_000 + start + count)

    class Two(SimpleNamespace):
        def __len__(self) -> int:
            return len(lengths)

    corpus = Two(name="two", lengths=lengths, total=int(lengths.sum()), read=read)
    rows = long_documents(corpus, 500, 4, np.random.default_rng(0))
    assert sorted(rows[:, 0].tolist()) == [0, 500, 10_000, 10_500]
