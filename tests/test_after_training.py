"""Each step after training is done once, and again only when its model or its settings have changed."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from longctx.assets import tiny_model
from longctx.config.after_training import AfterTrainingConfig, SideRun
from longctx.config.base import build
from longctx.config.data import SourceConfig
from longctx.config.train import ParallelConfig, TrainConfig
from longctx.data.tokenizer import load_tokenizer
from longctx.errors import UserError
from longctx.rope import make_rule, read_rope
from longctx.run.adapter import extract_adapter, merge_sibling
from longctx.run.after_training import run_after_training
from longctx.run.side_config import side_config
from longctx.run.side_run import train_side
from longctx.run.summary import print_closing_lines
from longctx.run.train import run
from longctx.run.what_follows import check_what_follows, prepare_what_follows
from longctx.train import runfolder
from longctx.train.checks import load_checked_tokenizer
from longctx.train.train import resolve_stages
from tests.test_report import Page
from tests.train.made import config as run_config
from tests.train.made import write_documents

AFTER = {
    "lora": {"rank": 4, "embeddings": False},
    "sibling": {"path": "???", "behaviour": "text"},
    "evidence": {
        "source": "text", "needle": {"lengths": [384], "per_cell": 1, "seeds": [1]}, "theta_only": False,
        "unseen": None, "heldout_lengths": [64], "heldout_sequences": 2,
    },
}  # fmt: skip


def write_model(out: Path, seed: int, *, theta: float = 40000, window: int = 1024) -> None:
    """The shipped model with every weight changed a little."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from longctx.model import export

    model = AutoModelForCausalLM.from_pretrained(tiny_model())
    generator = torch.Generator().manual_seed(seed)
    state = ((n, p + 0.01 * torch.randn(p.shape, generator=generator)) for n, p in model.named_parameters())
    rope = {"rope_type": "default", "rope_theta": theta}
    tokenizer = AutoTokenizer.from_pretrained(tiny_model())
    with torch.no_grad():
        export(state, str(tiny_model()), tokenizer, out, rope=rope, window=window)


def add_stage(run: Path, name: str, seq_len: int, seed: int) -> None:
    """Write the files that training leaves of a stage."""
    folder = run / "stages" / name
    write_model(folder / "model", seed, window=seq_len)
    mark = {"stage": name, "model": f"stages/{name}/model", "seq_len": seq_len, "theta": 40000, "tokens": 1, "steps": 1}
    (folder / "finished.json").write_text(json.dumps({**mark, "seconds": 1.0}))


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_documents(tmp_path_factory.mktemp("documents"))


def make_run(folder: Path, documents: Path) -> TrainConfig:
    write_model(folder / "sibling", 9, theta=10000, window=512)
    add_stage(folder / "run", "s1024", 1024, seed=1)
    made = run_config(
        folder / "run", documents,
        model={"init": None, "path": str(tiny_model()), "tokenizer": None},
        data={"sources": {"text": {"kind": "text", "path": str(documents)}}, "heldout": 0.4},
        after_training=with_sibling(AFTER, folder),
    )  # fmt: skip
    runfolder.prepare(made)
    return runfolder.with_dtype(made)


def with_sibling(asked: dict, folder: Path) -> dict:
    return {**asked, "sibling": {**asked["sibling"], "path": str(folder / "sibling")}}


def contents(run: Path) -> dict[str, bytes]:
    """The pieces that asked leave, by name."""
    files = ["adapter/adapter_model.safetensors", "merged/model.safetensors", "eval/behaviour.json"]
    files += [f"eval/{name}.json" for name in ("base", "extended", "sibling", "merged")]
    return {name: (run / name).read_bytes() for name in files}


def changed(before: dict[str, bytes], after: dict[str, bytes]) -> set[str]:
    return {name for name in before if before[name] != after[name]}


def test_what_stands_is_used_until_what_it_came_from_changes(
    tmp_path: Path, documents: Path, capsys: pytest.CaptureFixture[str]
):
    made, run = make_run(tmp_path, documents), tmp_path / "run"
    assert run_after_training(made, run) == 0
    first, times = contents(run), [(run / name).stat().st_mtime_ns for name in contents(run)]
    assert not (run / "merged" / "hashes.json").exists()  # the sibling has one, of other weights
    said = " ".join(capsys.readouterr().err.split())
    assert f"the sibling with the adapter merged in, a window of 1,024 tokens: {run}/merged" in said
    assert re.search(
        r"The base finds \d+ % of the needles at 384 tokens\. Extended, the same model finds \d+ %\.", said
    )

    assert run_after_training(made, run) == 0  # nothing has changed, nothing is made
    assert [(run / name).stat().st_mtime_ns for name in first] == times
    assert "again" not in capsys.readouterr().err

    for name in ("run", "sibling"):  # copied elsewhere, with new times
        shutil.copytree(tmp_path / name, tmp_path / "elsewhere" / name, copy_function=shutil.copyfile)
    assert made.after_training.sibling is not None
    sibling = replace(made.after_training.sibling, path=str(tmp_path / "elsewhere/sibling"))
    elsewhere = replace(
        made, run_dir=str(tmp_path / "elsewhere/run"), after_training=replace(made.after_training, sibling=sibling)
    )
    assert run_after_training(elsewhere, tmp_path / "elsewhere/run") == 0
    assert contents(tmp_path / "elsewhere/run") == first
    assert "again" not in capsys.readouterr().err

    asked = replace(made.after_training, lora=replace(made.after_training.lora, rank=6))
    assert run_after_training(replace(made, after_training=asked), run) == 0
    other_rank = contents(run)
    moved = {"adapter/adapter_model.safetensors", "merged/model.safetensors", "eval/merged.json", "eval/behaviour.json"}
    assert changed(first, other_rank) == moved
    assert json.loads((run / "summary.json").read_text())["adapter"]["rank"] == 6
    assert "adapter was made from another model or with other settings" in capsys.readouterr().err.replace("\n", " ")

    add_stage(run, "s2048", 2048, seed=2)
    assert run_after_training(replace(made, after_training=asked), run) == 0
    longer = contents(run)
    assert changed(other_rank, longer) == {*moved, "eval/extended.json"}
    assert json.loads((run / "merged" / "config.json").read_text())["max_position_embeddings"] == 2048

    assert asked.evidence is not None
    needle = replace(asked.evidence.needle, lengths=(448,))
    asked = replace(asked, evidence=replace(asked.evidence, needle=needle))
    assert run_after_training(replace(made, after_training=asked), run) == 0
    grids = {f"eval/{name}.json" for name in ("base", "extended", "sibling", "merged")}
    assert changed(longer, contents(run)) == grids
    assert set(json.loads((run / "summary.json").read_text())["needle"]["base"]) == {"448"}


def test_an_adapter_or_a_merge_that_is_not_whole_is_made_again(
    tmp_path: Path, documents: Path, capsys: pytest.CaptureFixture[str]
):
    """An interrupted copy or a full disk cuts files short; what lora merge reads later must be whole."""
    made, run = make_run(tmp_path, documents), tmp_path / "run"

    def make() -> None:
        extract_adapter(made, run / "stages/s1024/model", run / "adapter")
        merge_sibling(tmp_path / "sibling", run / "adapter", run / "merged")

    make()
    files = ["adapter/made_from.json", "adapter/longctx.json", "adapter/adapter_model.safetensors"]
    files += ["merged/made_from.json", "merged/config.json", "merged/model.safetensors"]
    for name in files:
        before = (run / name).read_bytes()
        for left in (0, len(before) // 2):
            (run / name).write_bytes(before[:left])
            capsys.readouterr()
            make()
            folder, file = name.split("/")
            said = " ".join(capsys.readouterr().err.split())
            assert re.search(rf"/{folder} is not whole \(.*{file}[^;]*\); making it again", said), said
            assert (run / name).read_bytes() == before
    capsys.readouterr()
    make()
    assert "again" not in capsys.readouterr().err


def test_a_sibling_with_tokens_of_its_own_gets_the_rows_it_shares_with_the_base(
    tmp_path: Path, documents: Path, capsys: pytest.CaptureFixture[str]
):
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    made, run = make_run(tmp_path, documents), tmp_path / "run"
    sibling = AutoModelForCausalLM.from_pretrained(tmp_path / "sibling")
    rows = sibling.lm_head.weight.shape[0]
    sibling.resize_token_embeddings(rows + 2, mean_resizing=False)
    sibling.save_pretrained(tmp_path / "more")
    extract_adapter(made, run / "stages/s1024/model", run / "adapter")
    merge_sibling(tmp_path / "sibling", run / "adapter", tmp_path / "merged")
    assert "lacks a part" not in capsys.readouterr().err
    merge_sibling(tmp_path / "more", run / "adapter", run / "merged")
    assert "the merged sibling lacks a part of the adapter: " in capsys.readouterr().err
    plain, more = (load_file(folder / "model.safetensors") for folder in (tmp_path / "merged", run / "merged"))
    before = load_file(tmp_path / "sibling" / "model.safetensors")
    for name, weight in plain.items():
        assert torch.equal(more[name][: len(weight)], weight), name
    moved = [name for name in plain if "layers" not in name and not torch.equal(plain[name], before[name])]
    assert moved, "the adapter of this run changes neither the embedding nor the output layer"


def test_the_closing_lines_say_all_and_none_only_where_it_is_so(capsys: pytest.CaptureFixture[str]):
    needle = {"base": {512: 1.0, 8192: 0.004}, "extended": {512: 1.0, 8192: 0.988}}
    pooled = {"base": 0.5, "extended": 0.996, "theta_only": 0.0, "control": 0.2, "unseen": 0.9996}
    print_closing_lines({"needle": needle, "needle_pooled": pooled, "changes": {}}, Path("run/eval/needle.png"))
    said = " ".join(capsys.readouterr().err.split())
    assert "The base finds 100 % of the needles at 512 tokens and 0.4 % at 8,192." in said
    assert "the same model finds 99.6 % over all lengths and 99 % at 8,192 tokens." in said
    assert re.findall(r"[\d.]+ % with", said) == ["0 % with", "20 % with", "99.96 % with"]


TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
TALKS = [
    [("user", f"What is {n} plus 1?"), ("assistant", f"It is {n + 1}, since one more than {n}.")] for n in range(6)
]


def with_chat(made: TrainConfig, folder: Path) -> TrainConfig:
    """The run with a source of conversations that no mix reads, and with rows of 128 and 640 tokens."""
    rows = [{"messages": [{"role": role, "content": text} for role, text in talk]} for talk in TALKS]
    (folder / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    chat = build(SourceConfig, {"kind": "chat", "path": str(folder / "chat.jsonl")}, origin="test")
    asked = made.after_training
    assert asked.evidence is not None
    evidence = replace(asked.evidence, beside=("chat",), heldout_lengths=(128, 640), heldout_sequences=3)
    data = replace(made.data, sources={**made.data.sources, "chat": chat})
    return replace(made, data=data, after_training=replace(asked, evidence=evidence))


def assistant_loss(model: Path) -> float:
    """By transformers alone: the mean loss of the assistant's tokens over all conversations."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    plain, tokenizer = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    total, count = 0.0, 0
    for (_, asked), (_, answer) in TALKS:
        prompt, said = f"<|user|>\n{asked}\n<|assistant|>\n", f"{answer}\n"
        encoded = tokenizer(prompt + said, return_offsets_mapping=True, add_special_tokens=False)
        ids = torch.tensor([encoded.input_ids])
        labels = [
            i if a >= len(prompt) else -100 for i, (a, _) in zip(ids[0].tolist(), encoded.offset_mapping, strict=True)
        ]
        own = sum(label != -100 for label in labels)
        with torch.inference_mode():
            total += own * float(plain(ids, labels=torch.tensor([labels])).loss)
        count += own
    return total / count


def test_what_extending_costs_stands_beside_what_it_wins(tmp_path: Path, documents: Path, capsys):
    """On the screen, in summary.json and on the page; in conversations only the assistant's tokens count."""
    made, run = make_run(tmp_path, documents), tmp_path / "run"
    made = with_chat(made, tmp_path)
    for folder in (run / "stages/s1024/model", tmp_path / "sibling"):
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": TEMPLATE}))
    assert run_after_training(made, run) == 0
    summary = json.loads((run / "summary.json").read_text())
    rows = {name: {row["text"]: (row["before"], row["after"]) for row in found}
            for name, found in summary["changes"].items()}  # fmt: skip
    names = ["text, 128 tokens", "text, 640 tokens", "chat, whole conversations"]
    assert {name: list(found) for name, found in rows.items()} == {"extended": names, "merged": names}
    models = {"extended": run / "stages/s1024/model", "sibling": tmp_path / "sibling"}
    for name, folder in models.items():
        assert summary["loss_elsewhere"]["chat"][name] == pytest.approx(assistant_loss(folder), rel=1e-4)
    before, after = rows["extended"]["chat, whole conversations"]
    assert (before, after) == tuple(summary["loss_elsewhere"]["chat"][name] for name in ("base", "extended"))

    said = " ".join(capsys.readouterr().err.split())
    assert f"chat, whole conversations {before:.3f} -> {after:.3f} ({after / before - 1:+.1%})" in said
    assert said.count("(a rise is what it costs)") == 2
    tables = Page(run / "report.html").tables
    assert [row[1] for row in tables["What it costs and gains"][1:]] == [*names, *names]
    assert ["base and extended", names[2], f"{before:.4f}", f"{after:.4f}", f"{after / before - 1:+.1%}"] in (
        tables["What it costs and gains"]
    )
    height = int.from_bytes((run / "eval/needle.png").read_bytes()[20:24], "big")
    assert height > 800  # 467 without the loss by position, which is drawn where it goes beyond the base's window
    by_position = tables["Loss by position in 640 tokens"]
    assert by_position[0] == ["positions", "base", "extended", "sibling", "merged"]
    assert [row[0] for row in by_position[1:]] == [
        "1 to 64", "65 to 128", "129 to 256", "257 to 512", "513 to 640"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"evidence": {"beside": ["chta"]}}, "after_training.evidence.beside=chta is not a source"),
        ({"evidence": {"source": "txet"}}, "after_training.evidence.source=txet is not a source"),
        ({"sibling": {"behaviour": "txt"}}, "after_training.sibling.behaviour=txt is not a source .*'text'"),
        (
            {"evidence": {"control": {"stage": {"seq_len": 64, "theta": 1e4, "steps": 1, "batch": 1, "mix": "nix"}}}},
            "after_training.evidence.control.stage.mix=nix is not one of data.mixes",
        ),
        ({"evidence": {"beside": ["unread"]}}, "data.sources.unread.path=/nowhere does not exist"),
    ],
    ids=["beside", "source", "behaviour", "mix", "file"],
)
def test_a_name_that_follows_training_is_checked_before_it(
    tmp_path: Path, documents: Path, changed: dict, message: str
):
    asked = with_sibling(AFTER, tmp_path)
    write_model(tmp_path / "sibling", 9, theta=10000, window=512)
    sources = {"text": {"kind": "text", "path": str(documents)}, "unread": {"kind": "text", "path": "/nowhere"}}
    made = run_config(
        tmp_path / "run", documents, model={"init": None, "path": str(tiny_model()), "tokenizer": None},
        data={"sources": sources},
        after_training={**asked, **{name: {**asked[name], **values} for name, values in changed.items()}},
    )  # fmt: skip
    with pytest.raises(UserError, match=message):
        run(made)
    assert not (tmp_path / "run").exists()


FULL = {"prolong": {"share": 1.0}}
ONE_STAGE = {"stages": {"s1024": {"seq_len": 1024, "theta": 40000, "steps": 1, "batch": 1}}}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (None, r"after_training\.sibling\.path=\S+ does not exist"),
        ({"window": 1024}, r"sibling\.path=\S+ has the rope and window of the last stage already .*, 1024"),
        ({"num_hidden_layers": 1}, r"sibling\.path=\S+ is no fine-tune of model\.path=.*layers\.1\.\S+ is None there"),
        ({"num_attention_heads": 8, "head_dim": 16, "num_key_value_heads": 4}, "num_attention_heads is 8 there and 4"),
    ],
    ids=["missing", "extended", "layers", "heads"],
)
def test_a_sibling_that_cannot_take_the_adapter_is_refused_before_training(
    tmp_path: Path, documents: Path, values: dict | None, message: str
):
    sibling = tmp_path / "sibling"
    if values is not None:
        extended = values.pop("window", None)
        write_model(
            sibling, 9, **({"theta": 40000, "window": extended} if extended else {"theta": 10000, "window": 512})
        )
        path = sibling / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
        if "num_hidden_layers" in values:
            drop_layer(sibling / "model.safetensors", "layers.1.")
    made = run_config(
        tmp_path / "run", documents, curriculum=ONE_STAGE,
        model={"init": None, "path": str(tiny_model()), "tokenizer": None},
        after_training={"lora": {"enabled": True}, "sibling": {"path": str(sibling)}},
    )  # fmt: skip
    with pytest.raises(UserError, match=message):
        run(made)
    assert not (tmp_path / "run").exists()


def drop_layer(weights: Path, layer: str) -> None:
    from safetensors.torch import load_file, save_file

    save_file({name: value for name, value in load_file(weights).items() if layer not in name}, weights)
    weights.with_name("model.safetensors.index.json").unlink(missing_ok=True)


@pytest.mark.parametrize(
    ("data", "changed", "message"),
    [
        ({"heldout": 0.0}, {}, "source=text holds out no document at data.heldout=0"),
        (
            {}, {"evidence": {"needle": {"lengths": [16], "per_cell": 1, "seeds": [1]}}},
            r"after_training\.evidence\.needle: lengths: .* needs \d+ tokens, and length=16",
        ),
        (
            {"mixes": {"default": {"text": 1.0}, "long": {"text": {"weight": 1.0, "length": FULL}}}},
            {"sibling": {"path": None, "run": {"stage": {"seq_len": 4096, "theta": 2e4, "steps": 1, "batch": 1,
                                                         "mix": "long"}}}},
            "in stage sibling/train: prolong.share=1 asks for documents of 4,096 tokens",
        ),
    ],
    ids=["held out", "needles", "sibling's documents"],
)  # fmt: skip
def test_documents_that_do_not_serve_what_follows_training_are_refused_before_it(
    tmp_path: Path, documents: Path, data: dict, changed: dict, message: str
):
    write_model(tmp_path / "sibling", 9, theta=10000, window=512)
    asked = with_sibling(AFTER, tmp_path)
    made = run_config(
        tmp_path / "run", documents, curriculum=ONE_STAGE, evaluate={"heldout_sequences": 0},
        model={"init": None, "path": str(tiny_model()), "tokenizer": None},
        data={"sources": {"text": {"kind": "text", "path": str(documents)}}, "heldout": 0.4, **data},
        after_training={**asked, **{name: {**asked[name], **values} for name, values in changed.items()}},
    )  # fmt: skip
    with pytest.raises(UserError, match=message):
        run(made)
    assert not (tmp_path / "run" / "stages").exists()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"heldout_sequences": 0}, "heldout_sequences"),
        ({"heldout_lengths": []}, r"sibling\.behaviour is a loss on held-out text"),
        ({"heldout_lengths": [], "beside": ["text"]}, "at least one where beside names sources"),
        ({"unseen": {"question": "{key}?"}}, r"unseen.*question='\{key\}\?' must hold"),
        ({"needle": {"needle": "{value}"}}, r"needle='\{value\}' must hold \{key\} once"),
        ({"heldout_lengths": [1]}, r"evidence\.heldout_lengths\.0=1 must be 2 or more"),
    ],
)
def test_evidence_that_cannot_be_measured_is_refused(tmp_path: Path, changed: dict, message: str):
    asked = with_sibling(AFTER, tmp_path)
    with pytest.raises(UserError, match=message):
        build(AfterTrainingConfig, {**asked, "evidence": {**asked["evidence"], **changed}}, origin="test")


def test_a_tokenizer_that_is_not_the_base_s_is_refused_before_training(tmp_path: Path, documents: Path):
    other = tmp_path / "other"
    shutil.copytree(tiny_model(), other)
    path = other / "tokenizer.json"
    table = json.loads(path.read_text())
    vocab = table["model"]["vocab"]
    vocab["9"], vocab["8"] = vocab["8"], vocab["9"]
    path.write_text(json.dumps(table))
    made = run_config(
        tmp_path / "run", documents, curriculum=ONE_STAGE, after_training={"lora": {"enabled": True}},
        model={"init": None, "path": str(tiny_model()), "tokenizer": str(other)},
    )  # fmt: skip
    with pytest.raises(UserError, match=r"its tokenizer\.json has other tokens than .*model\.tokenizer=\S+other.*'8' "):
        run(made)
    assert not (tmp_path / "run" / "stages").exists()


def test_a_token_that_transformers_adds_is_named_with_the_key_that_adds_it(tmp_path: Path, documents: Path):
    """transformers reads the tokenizer of a Qwen2 folder with a class whose unk_token is <|endoftext|>."""
    own = tmp_path / "own"
    shutil.copytree(tiny_model(), own)
    config = json.loads((own / "config.json").read_text())
    (own / "config.json").write_text(json.dumps({**config, "model_type": "qwen2"}))
    made = run_config(
        tmp_path / "run", documents, curriculum=ONE_STAGE, after_training={"lora": {"enabled": True}},
        model={"init": None, "path": str(own), "tokenizer": None},
    )  # fmt: skip
    tokenizer = load_tokenizer(made.model)
    with pytest.raises(
        UserError, match=r"'<\|endoftext\|>' none / 512 .*set unk_token to null or to a token of"
    ) as refusal:
        prepare_what_follows(made, tokenizer)
    assert "the model's own tokenizer" not in str(refusal.value)
    settings = json.loads((own / "tokenizer_config.json").read_text())
    (own / "tokenizer_config.json").write_text(json.dumps({**settings, "unk_token": None}))
    prepare_what_follows(made, load_tokenizer(made.model))


def test_conversations_without_a_chat_template_are_refused_before_training(tmp_path: Path, documents: Path):
    made = with_chat(make_run(tmp_path, documents), tmp_path)
    with pytest.raises(UserError, match=r"source chat, .* no chat template; .*evidence\.beside=\[\]"):
        load_checked_tokenizer(made)


def test_a_sibling_without_an_adapter_is_refused(tmp_path: Path):
    values = {**with_sibling(AFTER, tmp_path), "lora": {"enabled": False}}
    with pytest.raises(UserError, match="a sibling is what the adapter is merged into"):
        build(AfterTrainingConfig, values, origin="test")


SIDE = build(SideRun, {"stage": {"seq_len": 64, "theta": 10000, "steps": 1, "batch": 4}}, origin="test")


@pytest.mark.parametrize("parallel", [{"cp": 2}, {"cp_by_stage": {"s64": 1}}, {"cp": "all"}])
def test_a_side_run_keeps_what_a_rank_holds_and_divides_its_own_ranks(tmp_path: Path, documents: Path, parallel: dict):
    made = run_config(tmp_path / "run", documents, parallel={"seq_len_per_rank": 4096, "ulysses": 2, **parallel})
    own = side_config(made, tmp_path / "run", "control", SIDE)
    kept = {"cp": "all"} if parallel == {"cp": "all"} else {}
    assert own.parallel == ParallelConfig(seq_len_per_rank=4096, **kept)
    assert list(own.curriculum.stages) == ["control"]


def test_a_finished_side_run_of_another_config_is_refused(tmp_path: Path, documents: Path):
    made, run = run_config(tmp_path / "run", documents), tmp_path / "run"
    own = side_config(made, run, "control", SIDE)
    runfolder.prepare(own)
    finished = run / "side" / "control" / "stages" / "control" / "finished.json"
    finished.parent.mkdir(parents=True)
    finished.write_text("{}")
    (finished.parent / "model").mkdir()
    for name in ("config.json", "model.safetensors"):
        (finished.parent / "model" / name).write_text("{}")
    assert train_side(made, run, "control", SIDE) == finished.parent / "model"
    longer = replace(SIDE, stage=replace(SIDE.stage, steps=2))
    with pytest.raises(UserError, match=r"curriculum.stages.control.steps was 1, now 2"):
        train_side(made, run, "control", longer)


def write_base(folder: Path, *, tied: bool) -> str:
    from transformers import AutoModelForCausalLM, LlamaConfig

    shape = LlamaConfig(
        vocab_size=512, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=tied,
    )  # fmt: skip
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(shape).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("tied", "lora", "frozen"),
    [
        (False, {}, ["*embed_tokens*"]),
        (True, {}, []),
        (False, {"embeddings": True}, []),
        (False, {"profile": "serving"}, ["*embed_tokens*", "*norm*", "*lm_head*"]),
        (True, {"profile": "serving"}, ["*embed_tokens*", "*norm*"]),
    ],
)
def test_a_full_rank_adapter_carries_all_that_is_trained(
    tmp_path: Path, documents: Path, capsys: pytest.CaptureFixture[str], tied: bool, lora: dict, frozen: list[str]
):
    stages = {"s64": {"seq_len": 64, "theta": 10000, "steps": 3, "batch": 2}}
    made = run_config(
        tmp_path / "run", documents, curriculum={"stages": stages}, evaluate={"heldout_sequences": 0},
        model={"init": None, "path": write_base(tmp_path / "base", tied=tied)},
        after_training={"lora": {"rank": 64, **lora}},
    )  # fmt: skip
    assert run(made) == 0
    adapter = json.loads((tmp_path / "run/adapter/longctx.json").read_text())
    assert adapter["share"]["everything"] >= 0.999
    assert runfolder.read(tmp_path / "run/config.yaml").optim.freeze == frozen
    said = " ".join(capsys.readouterr().err.split())
    assert ("frozen (optim.freeze): *embed_tokens*" in said) == bool(frozen)
    assert "100.0% of the squared norm of what training changed" in said
    assert "not carried" not in said
    if not lora:  # the run goes on with what it began with, whatever its adapter becomes
        other = replace(
            made, after_training=replace(made.after_training, lora=replace(made.after_training.lora, profile="serving"))
        )
        assert run(other) == 0
        assert runfolder.read(tmp_path / "run/config.yaml").optim.freeze == frozen
        assert "trained, but not carried by the adapter: " in " ".join(capsys.readouterr().err.split())


def test_the_adapters_of_the_stages_follow_the_settings_of_each_start(
    tmp_path: Path, documents: Path, capsys: pytest.CaptureFixture[str]
):
    base, folders = write_base(tmp_path / "base", tied=False), [tmp_path / f"run/stages/{name}" for name in ("a", "b")]
    lengths = {"a": 64, "b": 128}
    stages = {n: {"seq_len": length, "theta": 10000, "steps": 1, "batch": 2} for n, length in lengths.items()}

    def start(**lora: object) -> list[tuple[int, int]]:
        """Train or go on; returns rank and time of the stages' adapters."""
        made = run_config(
            tmp_path / "run", documents, curriculum={"stages": stages}, evaluate={"heldout_sequences": 0},
            model={"init": None, "path": base}, after_training={"lora": lora},
        )  # fmt: skip
        assert run(made) == 0
        files = [found for folder in folders if (found := folder / "adapter/adapter_config.json").exists()]
        return [(json.loads(file.read_text())["r"], file.stat().st_mtime_ns) for file in files]

    assert start(rank=4) == []
    first = start(rank=4, per_stage=True)  # switched on when both stages are trained
    assert [rank for rank, _ in first] == [4, 4]
    assert "stages/a/adapter: rank 4, " in capsys.readouterr().err
    assert start(rank=4, per_stage=True) == first

    shutil.rmtree(folders[0] / "model")  # without its model an adapter cannot be made again
    assert [rank for rank, _ in start(rank=6, per_stage=True)] == [4, 6]
    said = capsys.readouterr().err
    assert "stages/b/adapter was made from another model or with other settings; making it again" in said


def with_side(folder: Path, documents: Path, **stage: object) -> TrainConfig:
    """A run of the shipped model, whose window is 512, and a sibling that a side run trains."""
    sibling = {"run": {"stage": {"steps": 1, "batch": 2, **stage}}}
    return run_config(
        folder / "run", documents, model={"init": None, "path": str(tiny_model()), "tokenizer": None},
        after_training={"lora": {"enabled": True}, "sibling": sibling},
    )  # fmt: skip


def test_a_side_run_longer_than_the_window_follows_the_curriculums_rule(tmp_path: Path, documents: Path):
    made = with_side(tmp_path, documents, seq_len=1024)
    made = replace(made, curriculum=replace(made.curriculum, rule=make_rule("dynamic-ntk", {})))
    check_what_follows(made)
    (_, side) = made.after_training.side_runs["sibling"]
    (stage,) = resolve_stages(side_config(made, tmp_path / "run", "sibling", side))
    assert (stage.window, stage.rule) == (1024, "dynamic-ntk")
    assert stage.theta > 10000


def test_a_side_run_of_an_earlier_version_goes_on_where_that_is_meant(tmp_path: Path, documents: Path):
    """Its config.yaml has the curriculum's scratch, and no keep_window; the main run's `accept` holds for it too."""
    made = with_side(tmp_path, documents, seq_len=512, theta=10000)
    own = side_config(made, tmp_path / "run", "sibling", made.after_training.side_runs["sibling"][1])
    folder = runfolder.prepare(own)
    values = yaml.safe_load((folder / "config.yaml").read_text())
    del values["curriculum"]["keep_window"]
    values["curriculum"]["scratch"] = True
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    (folder / "stages/sibling").mkdir(parents=True)
    (folder / "stages/sibling/finished.json").write_text("{}")
    with pytest.raises(UserError, match=r"scratch was True, now False.*'accept=\[curriculum\]'") as refused:
        runfolder.prepare(own)
    assert "curriculum.keep_window was False, now True" in str(refused.value)
    meant = replace(made, accept=["curriculum"])
    runfolder.prepare(side_config(meant, tmp_path / "run", "sibling", made.after_training.side_runs["sibling"][1]))
    stored = yaml.safe_load((folder / "config.yaml").read_text())["curriculum"]
    assert (stored["keep_window"], stored["scratch"]) == (True, False)


def test_a_sibling_of_short_sequences_keeps_the_window_and_the_rope_of_its_base(tmp_path: Path, documents: Path):
    made = with_side(tmp_path, documents, seq_len=128)
    check_what_follows(made)
    side = build(SideRun, {"stage": {"seq_len": 128, "steps": 1, "batch": 2}}, origin="test")
    found, base = read_rope(train_side(made, tmp_path / "run", "sibling", side)), read_rope(tiny_model())
    assert (found.parameters, found.window) == (base.parameters, base.window)


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ({"seq_len": 1024}, r"after_training\.sibling\.run\.stage names neither theta nor rule"),
        ({"seq_len": 128, "theta": 5000}, r"after_training\.sibling\.run\.stage: theta=5000 is below the 10000"),
        ({"seq_len": 128, "batch": None, "batch_tokens": 200}, r"sibling\.run\.stage\.batch_tokens=200 is not a whole"),
    ],
    ids=["theta", "fall", "batch"],
)
def test_a_side_run_that_cannot_be_trained_is_refused_before_the_run(
    tmp_path: Path, documents: Path, stage: dict, message: str
):
    with pytest.raises(UserError, match=message):
        run(with_side(tmp_path, documents, **stage))
    assert not (tmp_path / "run").exists()
