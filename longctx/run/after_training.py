"""The steps after training: adapter, sibling, control, needle grids and losses, picture, summary, page.

A step is skipped where its result exists and its fingerprint matches. The last lines on the screen summarize the result
and name the picture.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from longctx import console
from longctx.config.after_training import EvidenceSettings
from longctx.config.train import TrainConfig
from longctx.eval.evaluate import EvalResult, EvalTarget, count_forwards, evaluate
from longctx.eval.heldout_text import open_heldout_text
from longctx.report.page import finished_stages, write_page
from longctx.rope import read_rope
from longctx.run import evidence
from longctx.run.adapter import extract_adapter, merge_sibling
from longctx.run.evidence import Claim
from longctx.run.proof import draw_proof
from longctx.run.side_run import train_side
from longctx.run.summary import print_closing_lines, write_summary
from longctx.train.checks import cache_folder

COMPARED = ("extended", "sibling", "merged")  # with the base, where the loss on other sources is measured


def run_after_training(config: TrainConfig, folder: Path) -> int:
    """Do what config.after_training asks for, and return 0.

    A randomly initialized model has no base to subtract, so it gets no adapter.
    """
    stages = finished_stages(folder)
    if not stages:
        return 0
    began = time.monotonic()
    tuned = folder / stages[-1]["model"]
    asked = config.after_training
    adapter, merged, sibling = folder / "adapter", folder / "merged", None
    if asked.lora.enabled and config.model.path is not None:
        console.say("after training: the adapter (tuned minus base)")
        extract_adapter(config, tuned, adapter)
    if asked.sibling is not None:
        sibling = Path(asked.sibling.path or "")
        if asked.sibling.run is not None:
            console.say("after training: a sibling, another fine-tune of the same base")
            sibling = train_side(config, folder, "sibling", asked.sibling.run)
        merge_sibling(sibling, adapter, merged)
    if asked.evidence is None:
        console.say(f"the run on one page: {write_page(folder)}")
        return 0
    control = None
    if asked.evidence.control is not None:
        console.say("after training: the control, the same tokens at the base's window and theta")
        control = train_side(config, folder, "control", asked.evidence.control)
    results = _examine_all(config, asked.evidence, folder, stages, tuned, sibling, control)
    elsewhere = _examine_sources(config, asked.evidence, folder, results)
    seconds = time.monotonic() - began
    picture = folder / "eval" / "needle.png"
    draw_proof(results, picture)
    summary = write_summary(config, folder, stages, results, elsewhere, seconds)
    write_page(folder)
    print_closing_lines(summary, picture)
    return 0


def _examine_all(
    config: TrainConfig, settings: EvidenceSettings, folder: Path, stages: list[dict[str, Any]],
    tuned: Path, sibling: Path | None, control: Path | None,
) -> dict[str, EvalResult]:  # fmt: skip
    claims = _claims(config, settings, folder, stages, tuned, sibling, control)
    out = folder / "eval"
    heldout = open_heldout_text(config.data, settings.source, tuned, cache_folder(config))
    evidence.remark_short_text(heldout, max(claim.questions(settings).longest for claim in claims), settings.source)
    found = {}
    total = sum(count_forwards(claim.target, claim.questions(settings), heldout, out) for claim in claims)
    with console.progress(shown=total > 0) as bar:
        task = bar.add_task("", total=total)
        for claim in claims:
            bar.update(task, description=f"needles and loss: {claim.name}")
            questions = claim.questions(settings)
            found[claim.name] = evaluate(claim.target, questions, heldout, out, tick=lambda: bar.advance(task))
    return found


def _examine_sources(
    config: TrainConfig, settings: EvidenceSettings, folder: Path, results: dict[str, EvalResult]
) -> dict[str, dict[str, float]]:
    """Return {source: {model: loss}} of what the sibling was tuned for, and of the sources in evidence.beside."""
    found = {}
    for source, name in evidence.further_sources(config, settings).items():
        chosen = ("base", *COMPARED) if name == "behaviour" else ("base", "theta_only", *COMPARED)
        targets = [results[model].target for model in chosen if model in results]
        tokenizer = results["extended"].target.path
        found[source] = evidence.source_losses(
            name, source, targets, config, settings, Path(tokenizer), folder / "eval"
        )
    return found


def _claims(
    config: TrainConfig, settings: EvidenceSettings, folder: Path, stages: list[dict[str, Any]],
    tuned: Path, sibling: Path | None, control: Path | None,
) -> list[Claim]:  # fmt: skip
    """The models to evaluate: the base, its controls, the extended model, the sibling before and after the merge."""
    base = str(config.model.path)
    claims = [Claim(EvalTarget("base", base, "base"))]
    if settings.theta_only:
        rope = read_rope(tuned)
        title = "control: theta changed, nothing trained"
        claims.append(Claim(EvalTarget("theta_only", base, title, rope=dict(rope.parameters), window=rope.window)))
    if control is not None:
        claims.append(Claim(EvalTarget("control", str(control), "control: same tokens, old window and theta")))
    claims.append(Claim(EvalTarget("extended", str(tuned), "extended")))
    for stage in stages[:-1]:
        target = EvalTarget(f"stage_{stage['stage']}", str(folder / stage["model"]), f"after stage {stage['stage']}")
        claims.append(Claim(target, grid=False))
    if sibling is not None:
        claims.append(Claim(EvalTarget("sibling", str(sibling), "sibling: another fine-tune of the base")))
        claims.append(Claim(EvalTarget("merged", str(folder / "merged"), "sibling + adapter")))
    if settings.unseen is not None:
        title = "extended, asked in words that training never saw"
        claims.append(Claim(EvalTarget("unseen", str(tuned), title), losses=False, unseen=True))
    return claims
