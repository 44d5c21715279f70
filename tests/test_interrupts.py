"""Ctrl-C and SIGTERM at random instants of every verb that takes long: status, output, processes, files.

`pytest -m slow tests/test_interrupts.py` takes 20 instants of each.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.interrupted import Command, Outcome
from tests.train.made import TOKENIZER, write_documents

VERBS = ("data", "train", "eval", "lora extract", "lora merge")


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents (few, and 5 MB of them), a base, a tuned model and an adapter between them."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from longctx.config.lora import ExtractConfig
    from longctx.lora.extract import extract

    folder = tmp_path_factory.mktemp("material")
    write_documents(folder / "few")
    (folder / "many").mkdir()
    text = " ".join(path.read_text() for path in sorted((folder / "few").iterdir()))
    for number in range(8):
        (folder / "many" / f"{number}.txt").write_text((text * 30)[number : number + 600_000])
    shape = LlamaConfig(
        hidden_size=256, intermediate_size=512, num_hidden_layers=8, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=512, max_position_embeddings=512,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(shape)
    for name in ("base", "tuned"):
        model.save_pretrained(folder / name)
        AutoTokenizer.from_pretrained(TOKENIZER).save_pretrained(folder / name)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.01 * torch.randn_like(parameter)
    tiny = LlamaConfig(**{**shape.to_dict(), "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2})
    for name in ("one", "other"):
        LlamaForCausalLM(tiny).save_pretrained(folder / name)
        AutoTokenizer.from_pretrained(TOKENIZER).save_pretrained(folder / name)
    extract(ExtractConfig(base=str(folder / "base"), tuned=str(folder / "tuned"), out=str(folder / "adapter"), rank=8))
    return folder


def words(verb: str, material: Path, where: Path) -> list[str]:
    text, model = ["data=text"], f"model.path={material / 'base'}"
    if verb == "data":
        return [verb, "model=tiny", *text, f"data.path={material / 'many'}", "workers=2", f"cache={where / 'cache'}"]
    if verb == "train":
        return [
            verb, model, *text, f"data.path={material / 'few'}", "launch.nproc=2", f"run_dir={where / 'run'}",
            "~curriculum.stages.s2048", "~curriculum.stages.s8192", "curriculum.scratch=true",
            "+curriculum.stages.s512={seq_len: 512, theta: 20000, steps: 4, batch: 2}",
            "checkpoint.every_steps=1", "checkpoint.spare_gib=0", "evaluate.heldout_sequences=2",
        ]  # fmt: skip
    if verb == "eval":
        return [
            verb, f"models={{one: {material / 'one'}, other: {material / 'other'}}}", *text,
            f"data.path={material / 'many'}", "data.heldout=0.3", "source=text", f"cache={where / 'cache'}",
            "needle.lengths=[384,512]", "needle.per_cell=4", "needle.seeds=[11]", "loss_lengths=[512]",
            "loss_sequences=16", f"out={where / 'out'}",
        ]  # fmt: skip
    if verb == "lora extract":
        return [*verb.split(), f"base={material / 'base'}", f"tuned={material / 'tuned'}", f"out={where / 'out'}"]
    return [*verb.split(), f"target={material / 'base'}", f"adapter={material / 'adapter'}", f"out={where / 'out'}"]


def check_interrupted(outcome: Outcome, at: str) -> None:
    lines = outcome.said.strip().splitlines()
    assert outcome.status == 130, (at, outcome)
    assert [line for line in lines if "interrupted" in line] == lines[-1:], (at, outcome)
    assert lines[-1].startswith("longctx: interrupted"), (at, outcome)
    assert not [line for line in lines if "Traceback" in line or "Error" in line or "Exception" in line], (at, outcome)
    assert (outcome.left, outcome.partial) == ([], []), (at, outcome)


def interrupt(
    verb: str, material: Path, folder: Path, wanted: int, length: float, *, tries: int, seed: int = 1
) -> tuple[int, int]:
    """Interrupt the command at random instants of `length` seconds until `wanted` came before its end.

    Returns how many did, and how many were drawn: `tries` at most.
    """
    rng, met, number = random.Random(f"{verb} {seed}"), 0, 0
    while met < wanted and number < tries:
        number += 1
        where, after = folder / str(number), rng.uniform(0.0, length)
        life = Command(where, words(verb, material, where))
        life.send(signal.SIGINT, after)
        if rng.random() < 0.3:
            life.send(signal.SIGINT, rng.uniform(0, 0.1))
        outcome = life.outcome()
        if outcome.status == 0 and not outcome.left:
            continue
        check_interrupted(outcome, f"{verb} after {after:.2f} of {length:.2f} s")
        met += 1
    return met, number


@pytest.mark.parametrize("verb", ["data", "train", "lora merge"])
def test_ctrl_c_leaves_one_line_and_nothing_else(tmp_path: Path, material: Path, verb: str) -> None:
    instants = 2 if verb == "data" else 1
    length = 1.0 if verb == "lora merge" else 4.0  # merging the tiny model takes little more than its imports
    met, _ = interrupt(verb, material, tmp_path, wanted=instants, length=length, tries=instants)
    assert met >= 1


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("verb", VERBS)
def test_ctrl_c_at_20_random_instants(tmp_path: Path, material: Path, verb: str) -> None:
    began = time.monotonic()
    outcome = Command(tmp_path / "whole", words(verb, material, tmp_path / "whole")).outcome()
    assert (outcome.status, outcome.left, outcome.partial) == (0, [], []), outcome
    length = time.monotonic() - began
    met, drawn = interrupt(verb, material, tmp_path, wanted=20, length=length, tries=100)
    print(f"{verb}: {met} of {drawn} instants of {length:.1f} s came before the end; each ended as it must")
    assert met == 20


@pytest.mark.parametrize(("verb", "status"), [("train", 75), ("eval", 143)])
def test_a_signal_while_importing_leaves_at_once(tmp_path: Path, material: Path, verb: str, status: int) -> None:
    life = Command(tmp_path, words(verb, material, tmp_path))
    life.send(signal.SIGTERM)
    outcome = life.outcome()
    assert (outcome.status, outcome.left, outcome.partial) == (status, [], []), outcome
    assert outcome.said.count("\n") == 1
    assert "SIGTERM" in outcome.said


WHILE_IMPORTING = """
import os, signal, sys
class Terminal:
    def find_spec(self, name, path=None, target=None):
        if name == "longctx.cli":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Terminal())
from longctx.__main__ import main
sys.exit(main())
"""


def test_ctrl_c_while_the_command_imports_its_modules_prints_one_line():
    done = subprocess.run([sys.executable, "-c", WHILE_IMPORTING, "--help"], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "longctx: interrupted\n")


def test_a_signal_in_a_long_call_of_the_main_thread_is_answered(tmp_path: Path) -> None:
    """The main thread runs no Python, as in a collective; another thread removes the temporary file and exits."""
    code = (
        "import ctypes, os, threading; from pathlib import Path; from longctx import signals\n"
        "signals.catch()\n"
        "mutex, lock = ctypes.create_string_buffer(64), ctypes.CDLL(None).pthread_mutex_lock\n"
        "lock(mutex)\n"
        "with signals.temporary(Path('half')) as path:\n"
        "    path.write_text('x')\n"
        "    threading.Timer(0.2, os.kill, (os.getpid(), 2)).start()\n"
        "    lock(mutex)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=50,
        env=environment,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        check=False,
    )
    assert (done.returncode, done.stderr) == (130, "longctx: interrupted\n")
    assert not (tmp_path / "half").exists()


def test_the_first_line_comes_before_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from longctx import cli; from longctx.config import compose; real = compose.resolve\n"
        "def resolve(target):\n"
        "    if 'config' in target: return real(target)\n"
        "    print(*(name in sys.modules for name in ('torch', 'transformers')), flush=True); sys.exit()\n"
        "compose.resolve = resolve\n"
        "for words in eval(sys.argv[1]):\n"
        "    try: cli.main(words)\n"
        "    except SystemExit: pass\n"
    )
    verbs = [
        ["train", "model=tiny", "launch.nproc=2"], ["data", "model=tiny"], ["eval", "model.path=M", "format=json"],
        ["lora", "extract", "base=B", "tuned=T", "out=O"], ["lora", "merge", "target=T", "adapter=A", "out=O"],
        ["theta", "search=true", "model=tiny", "data=stdlib"],
    ]  # fmt: skip
    root = str(Path(__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", code, repr(verbs)], capture_output=True, text=True, cwd=tmp_path, timeout=100,
        env={**os.environ, "PYTHONPATH": root}, check=False,
    )  # fmt: skip
    assert done.stdout.splitlines() == ["False False"] * len(verbs), done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == len(verbs)
    assert lines[0] == "longctx: run: checking, then starting 2 ranks ..."
    assert all(line.startswith("longctx: ") for line in lines)


def test_a_signal_while_a_continued_run_starts_tells_what_is_saved(tmp_path: Path) -> None:
    (tmp_path / "run/stages/s64/checkpoints/step00000018").mkdir(parents=True)
    (tmp_path / "run/stages/s64/checkpoints/step00000018/manifest.json").touch()
    code = (
        "import signal, longctx.run.train as train, longctx.signals as signals\n"
        "signals.catch(requeue=True)\n"
        "train.settled_for_adapter = lambda config: signal.raise_signal(signal.SIGTERM)\n"
        "from tests.train.made import config\n"
        "from pathlib import Path\n"
        f"train.run(config(Path({str(tmp_path / 'run')!r}), Path()))"
    )
    root = str(Path(__file__).parents[1])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=False)
    assert done.returncode == 75, done.stderr
    assert done.stderr == "longctx: SIGTERM: saved at step 18; the same command continues the run\n"


def test_a_run_that_needs_longer_than_its_scheduler_gives_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    from longctx.distributed.ranks import Ranks
    from longctx.train.lead import Lead

    first = Ranks(0, 1, 0, 1, torch.device("cpu"))
    monkeypatch.setenv("LONGCTX_SIGNAL_LEAD", "600")
    lead = Lead()
    lead.save_seconds = 200.0
    for wait in (500.0, 300.0, 300.0):  # the first step of a stage is slow for other reasons
        lead.check(wait, first)
    assert capsys.readouterr().err == ""
    for _ in range(5):
        lead.check(500.0, first)
    said = capsys.readouterr().err
    assert said.count("warning") == 1
    assert "up to 700 s" in said
    assert "SBATCH_SIGNAL=B:USR1@910" in said
