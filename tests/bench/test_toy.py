"""The other benches at toy size: their JSON documents have the promised keys with consistent values."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from longctx.bench import data as bench_data
from longctx.cli import main
from longctx.config.model import InitConfig
from longctx.model import init_from
from tests.dist.ranks import CONTEXT
from tests.started import longctx
from tests.train.made import TOKENIZER, VOCAB, write_documents


@pytest.fixture
def bench(capsys: pytest.CaptureFixture[str]) -> Any:
    """`longctx bench WORDS format=json`, in this process; the document it prints."""

    def run(*words: str) -> dict[str, Any]:
        assert main(["bench", *words, "format=json"]) == 0
        return json.loads(capsys.readouterr().out)

    return run


def test_peak_is_the_best_of_its_sizes(bench):
    found = bench("peak", "sizes=[32,64]", "repeats=2", "dtype=float64")
    rates = found["flops_per_second"]
    assert list(rates) == ["32", "64"]
    assert found["peak"] == max(rates.values()) > 0


def test_data_is_packed_whole(bench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Tokens of the packed sequences, padding aside, are nearly those of the documents; the child is forked."""
    monkeypatch.setattr(bench_data.multiprocessing, "get_context", lambda method: CONTEXT)
    words = ["documents=2000", "seq_lens=[4096]", "parts=[pack]", f"out={tmp_path / 'deep/data.json'}"]
    found = bench("data", *words)
    assert found == json.loads((tmp_path / "deep/data.json").read_text())
    (pack,) = found["pack"]
    filled = pack["sequences"] * 4096 * (1 - pack["padding"])
    assert 0.9 * pack["tokens"] < filled <= pack["sequences"] * 4096
    assert pack["documents"] == 2000
    assert pack["pieces"] >= pack["sequences"]


@pytest.mark.slow  # CI has twelve minutes
def test_faults_leave_the_weights_of_an_undisturbed_run(bench, tmp_path: Path):
    """One SIGKILL and one SIGTERM of two ranks; tests/train/test_checkpoint.py has damaged checkpoints."""
    found = bench("faults", "kills=1", "kills_in_saves=0", "sigterms=1", "damage=false", "steps=10", f"out={tmp_path}")
    assert (sum(found["kills"].values()), found["sigterms"], found["bit_equal"]) == (1, 1, True)
    assert found["steps_lost_at_most"] <= 2
    exports = sorted(tmp_path.glob("*/stages/s128/model/model.safetensors"))
    assert len({path.read_bytes() for path in exports}) == 1 < len(exports)


@pytest.mark.timeout(1200)
@pytest.mark.slow  # CI has twelve minutes
@pytest.mark.parametrize("kills", [2, 20])
def test_kills_inside_background_saves_lose_nothing(bench, tmp_path: Path, kills: int):
    """SIGKILL of all ranks or of one before the pointer's rename; the run ends with the same bits."""
    steps = 24 if kills > 2 else 12
    found = bench(
        "faults", "kills=0", f"kills_in_saves={kills}", "sigterms=0", "damage=false", f"steps={steps}", "seed=1"
    )
    assert sum(found["kills_in_saves"].values()) == sum(found["parts_of_saves"].values()) == kills
    assert found["bit_equal"]
    print(found)


def test_a_step_has_a_loss_a_speed_and_a_peak():
    """Only longctx's side, in one process."""
    shape = "model={layers: 1, hidden: 32, heads: 2, kv_heads: 1, ffn: 48, vocab: 64, window: 64}"
    done = longctx("bench", "step", "seq_len=64", "pairs=1", "threads=1", "only=longctx", shape, "format=json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    ours = found["longctx"]
    assert set(found) >= {"seq_len", "pairs", "threads", "device", "longctx"}
    assert 3 < ours["loss"] < 6  # about log(64) untrained
    assert ours["tokens_per_second"] == pytest.approx(64 / ours["seconds"][0], rel=0.01)
    assert ours["peak_gib"] > 0.1


def test_theta_compares_rules_after_equal_training(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    from transformers import AutoTokenizer

    shape = InitConfig(layers=1, hidden=32, heads=2, kv_heads=1, ffn=48, vocab=VOCAB, window=64, seed=1)
    init_from(shape, attention="sdpa").save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(TOKENIZER).save_pretrained(tmp_path / "base")
    documents = write_documents(tmp_path / "docs")
    words = [
        f"train.model.path={tmp_path / 'base'}", "data@train.data=text", f"train.data.sources.text.path={documents}",
        "source=text", "train.data.heldout=0.3", "train.launch.nproc=1", "train.curriculum.mix=default",
        "~train.curriculum.stages.s2048", "~train.curriculum.stages.s8192", "train.curriculum.lr.warmup_steps=0",
        "+train.curriculum.stages.s384={seq_len: 384, steps: 2, batch: 2}", "train.evaluate.heldout_sequences=0",
        "rules=[ntk,yarn]", "needle={lengths: [384], per_cell: 1, seeds: [1]}", "documents=2", "base_length=64",
        f"out={tmp_path / 'out'}", "train.checkpoint.spare_gib=0",
    ]  # fmt: skip
    assert main(["bench", "theta", *words]) == 0
    table = capsys.readouterr().out
    assert "ntk" in table
    assert "yarn" in table
    found = json.loads((tmp_path / "out/table.json").read_text())
    assert [line["rule"] for line in found["rules"]] == ["ntk", "yarn"]
    assert found["tokens"] == {"s384": 2 * 2 * 384}
    for line in found["rules"]:
        assert list(line["before"]["needle"]) == ["384"]
        assert line["before"] != line["after"]
    ntk, yarn = found["rules"]
    assert ntk["thetas"][0] > 10000
    assert ntk["before"]["last_quarter"] != yarn["before"]["last_quarter"]
