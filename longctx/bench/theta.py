"""`longctx bench theta`: compare theta rules after equal training of the same model.

Every rule gets the same curriculum, tokens, data and seed; `searched` uses thetas found on the base before any
training. The base is evaluated with each rule's last rope, and the model after training. Results are stored per model,
so the same command continues an interrupted benchmark.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from longctx import console
from longctx.config.after_training import AdapterSettings, AfterTrainingConfig
from longctx.config.bench_theta import BenchThetaConfig
from longctx.config.theta import ThetaConfig
from longctx.config.train import TrainConfig
from longctx.curriculum import Stage, resolve
from longctx.data.check import check_sources, check_text_source
from longctx.errors import RunFailed
from longctx.fingerprint import fingerprint_of, folder_fingerprint
from longctx.rope import Rope, make_rule, read_rope, supported_length
from longctx.storage.files import write_text
from longctx.storage.model import check_model
from longctx.train.runfolder import stage_folder

SEARCHED = "searched"


@dataclass(frozen=True)
class EvalScores:
    """Scores of one model.

    needle: accuracy by length. last_quarter: the loss on the last quarter of the longest texts. base: the loss on short
    text.
    """

    needle: dict[str, float]
    last_quarter: float
    base: float


@dataclass(frozen=True)
class RuleLine:
    """A rule's line of the table; `before` has the scores of the untrained base with the rule's last rope."""

    rule: str
    thetas: list[float]
    supported_length: int | None
    before: EvalScores
    after: EvalScores


def run(config: BenchThetaConfig) -> int:
    """Train and evaluate every rule; prints a Markdown table or the JSON document."""
    from longctx.run.train import run as train

    out = Path(config.out)
    check_model(config.train.model.path)
    check_text_source(config.train.data, config.source, "source")
    check_sources(config.train.data, [config.source], out / "data")
    rope = read_rope(str(config.train.model.path))
    evaluator = Evaluator(config, out)
    base = evaluator.evaluate("base", Path(str(config.train.model.path)))
    lines: list[RuleLine] = []
    stages: list[Stage] = []
    for rule in config.rules:
        console.say(f"[bold]{rule}[/bold]")
        run_config = under(config, rule, out, rope)
        stages = stages_of(run_config, rope)
        last = stages[-1]
        folder = Path(run_config.folder)
        before = evaluator.evaluate(f"{rule}-before", Path(str(config.train.model.path)), last)
        model = stage_folder(folder, last.name) / "model"
        if train(run_config) != 0:
            raise RunFailed(f"the training under {rule} stopped; the same command continues it ({folder})")
        after = evaluator.evaluate(f"{rule}-after", model)
        supported = supported_length(Rope(last.rope, rope.head_dim, last.seq_len).frequencies())
        lines.append(RuleLine(rule, [stage.theta for stage in stages], supported, before, after))
    document = {"base": asdict(base), "rules": [asdict(line) for line in lines], "tokens": _tokens(stages)}
    (out / "table.json").write_text(json.dumps(document, indent=1), encoding="utf-8")
    if config.format == "json":
        console.emit_json(document)
    else:
        console.emit(markdown(base, lines))
    return 0


def under(config: BenchThetaConfig, rule: str, out: Path, rope: Rope) -> TrainConfig:
    """Return the run of one rule: the given run with this rule, with nothing after training, in its own folder."""
    curriculum = config.train.curriculum
    if rule == SEARCHED:
        curriculum = replace(curriculum, theta_file=str(search_all(config, out, rope)))
    else:
        curriculum = replace(curriculum, rule=make_rule(rule, {}))  # type: ignore[arg-type]
    return replace(
        config.train,
        name=f"bench-theta-{rule}",
        run_dir=str(out / rule),
        curriculum=curriculum,
        after_training=AfterTrainingConfig(lora=AdapterSettings(enabled=False)),
    )


def search_all(config: BenchThetaConfig, out: Path, rope: Rope) -> Path:
    """Search every stage's theta on the base, each at least the one before; returns the stage override file.

    A finished search is kept while its fingerprint matches. An interrupted one begins again without its override file,
    which would move the brackets, and finds its trials.
    """
    from longctx.theta.search import job_of
    from longctx.theta.search_work import run_search

    file, done = out / "search" / "theta.yaml", out / "search" / "finished"
    train = config.train
    asked = {"curriculum": asdict(train.curriculum), "data": asdict(train.data), "trials": asdict(config.trials)}
    key = fingerprint_of({"model": folder_fingerprint(str(train.model.path)), **asked})
    if done.exists() and done.read_text(encoding="utf-8") == key:
        return file
    file.unlink(missing_ok=True)
    names = [stage.name for stage in stages_of(config.train, rope)]
    for index, name in enumerate(names):
        known = str(file) if index else None
        curriculum = replace(config.train.curriculum, theta_file=known)
        job = ThetaConfig(
            model=config.train.model,
            curriculum=curriculum,
            data=config.train.data,
            search=True,
            trials=replace(config.trials, stage=name),
            run_dir=str(file.parent),
        )
        run_search(job_of(job, rope, stages_of(replace(config.train, curriculum=curriculum), rope)))
    write_text(done, key)
    return file


def stages_of(config: TrainConfig, rope: Rope) -> list[Stage]:
    """Resolve the curriculum for the base model."""
    return resolve(
        config.curriculum,
        head_dim=rope.head_dim,
        rope=rope.parameters,
        window=rope.window,
        file="configs/bench_theta.yaml",
    )


class Evaluator:
    """Measures grids and losses of models on the same held-out text and stores them in OUT/eval."""

    def __init__(self, config: BenchThetaConfig, out: Path) -> None:
        from longctx.eval.heldout_text import open_heldout_text

        self.config, self.out = config, out / "eval"
        model = config.train.model
        self.heldout = open_heldout_text(
            config.train.data, config.source, str(model.tokenizer or model.path), out / "data"
        )

    def evaluate(self, name: str, folder: Path, stage: Stage | None = None) -> EvalScores:
        """Evaluate the model at `folder`; a stage's rope replaces the model's own."""
        from longctx.eval.stored_results import load_result, store_result

        config, stored = self.config, self.out / f"{name}.json"
        asked = {"needle": asdict(config.needle), "windows": [config.documents, config.base_length]}
        rope = (stage.rope, stage.seq_len) if stage else None
        key = fingerprint_of({"model": folder_fingerprint(folder), "rope": rope, "ground": self.heldout.key, **asked})
        values: Any = load_result(stored, key)
        if values is None:
            values = asdict(self._measure(name, folder, stage))
            store_result(stored, key, values)
        return EvalScores(**{field.name: values[field.name] for field in fields(EvalScores)})

    def _measure(self, name: str, folder: Path, stage: Stage | None) -> EvalScores:
        from longctx.eval.loss import held_out_rows, token_losses
        from longctx.eval.predict import grid_of, load_plain

        config, heldout = self.config, self.heldout
        rope, window = (dict(stage.rope), stage.seq_len) if stage else (None, None)
        model = load_plain(folder, rope, window)
        grid = grid_of(model, config.needle, heldout, label=name)
        longest = max(config.needle.lengths)
        far = token_losses(model, held_out_rows(heldout, longest, config.documents))
        near = token_losses(model, held_out_rows(heldout, config.base_length, 4 * config.documents))
        tail = far[:, longest * 3 // 4 :]
        by_length = {str(length): share for length, share in grid.by_length().items()}
        return EvalScores(by_length, float(tail.mean()), float(near.mean()))


def markdown(base: EvalScores, lines: list[RuleLine]) -> str:
    """Return the Markdown table for docs/theta.md."""
    lengths = list(base.needle)
    head = ["rule", "thetas", "supported", *[f"needles {n}" for n in lengths], "last quarter", "short text"]
    rows = [["base, nothing changed", "", "", *_cells(base, lengths)]]
    for line in lines:
        thetas = " / ".join(f"{theta:,.0f}" for theta in line.thetas)
        supported = f"{line.supported_length:,}" if line.supported_length else "> 1,048,576"
        rows.append([f"{line.rule}, untrained", thetas, supported, *_cells(line.before, lengths)])
        rows.append([f"**{line.rule}, trained**", "", "", *_cells(line.after, lengths)])
    text = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in text)


def _cells(found: EvalScores, lengths: list[str]) -> list[str]:
    return [*[f"{found.needle[n]:.2f}" for n in lengths], f"{found.last_quarter:.3f}", f"{found.base:.3f}"]


def _tokens(stages: list[Stage]) -> Mapping[str, Any]:
    return {stage.name: stage.tokens for stage in stages}
