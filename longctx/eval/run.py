"""`longctx eval`: needle grids, loss on held-out text and loss by position of one model or several.

It uses the GPU if there is one. Under torchrun or srun, every rank loads the model and answers a share of the prompts.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longctx import console
from longctx.config.eval import EvalConfig, EvalModel, default_name
from longctx.config.model import ModelConfig
from longctx.data.check import check_sources, check_text_source
from longctx.data.tokenizer import check_tokenizer_of
from longctx.distributed.launcher import launcher_environment
from longctx.errors import UserError
from longctx.rope import read_rope, rope_of
from longctx.storage.files import write_text
from longctx.storage.model import check_model

if TYPE_CHECKING:
    from longctx.distributed.ranks import Ranks
    from longctx.eval.evaluate import EvalResult, EvalTarget, EvalTasks
    from longctx.eval.heldout_text import HeldoutText
    from longctx.rope import Rope

DAY = 86400.0  # seconds that ranks wait for one with a longer prompt


def run(config: EvalConfig) -> int:
    """Evaluate the models; prints the numbers, and writes a picture and JSON to `out` if it is given."""
    try:
        return _run(config)
    except UserError:
        if launcher_environment()["RANK"] == "0":
            raise
        return 2  # rank 0 prints it


def _run(config: EvalConfig) -> int:
    chosen = models_of(config)
    targets = [target_of(config, name, model) for name, model in chosen.items()]
    from longctx.distributed import ranks as worlds
    from longctx.eval.memory import remark_memory

    ranks = worlds.start(timeout_seconds=DAY)
    try:
        if not ranks.first:
            console.silence()
        for name, model in chosen.items():
            remark_memory(config, name, model.path, ranks)
        results = _examine_all(config, chosen, targets, ranks)
        if ranks.first:
            _write(config, results)
    finally:
        worlds.stop()
    return 0


def models_of(config: EvalConfig) -> dict[str, EvalModel]:
    """Return the models by name. Raises UserError when there is none, or when model and models are both given."""
    if config.models is not None:
        if config.model is not None:
            raise UserError("model and models are both given; put every model into models= (configs/eval.yaml)")
        return config.models
    if config.model is None or config.model.path is None:
        raise UserError(
            "model.path is missing; an evaluation takes a trained model (model.path=FOLDER) or several "
            "('models={base: FOLDER, tuned: FOLDER}') (configs/eval.yaml)"
        )
    return {default_name(config.model.path): EvalModel(path=config.model.path, tokenizer=config.model.tokenizer)}


def target_of(config: EvalConfig, name: str, model: EvalModel) -> EvalTarget:
    """Return the target of one model. Raises UserError when the folder holds no model that longctx supports."""
    from longctx.eval.evaluate import EvalTarget
    from longctx.model.architectures import check_config
    from longctx.model.load import check_builds, read_config

    try:
        _check_files(config, model)
        hf = read_config(model.path)
        check_config(hf, model.path)
        check_builds(hf, model.path)
        own = read_rope(model.path)
    except UserError as error:
        if config.models is None:
            raise
        text = str(error).replace("model.path=", f"models.{name}.path=")
        text = text.replace("model.tokenizer=", f"models.{name}.tokenizer=")
        raise UserError(text) from None
    changed = {**(model.rope or {}), **({"rope_theta": model.theta} if model.theta is not None else {})}
    if not changed:
        return EvalTarget(name, model.path, name, window=model.window)
    title = f"{name} (theta {model.theta:,.0f})" if model.theta is not None else f"{name} (another rope)"
    rope = _checked({**hf.to_dict(), "rope_parameters": {**own.parameters, **changed}, "rope_scaling": None}, name)
    return EvalTarget(name, model.path, title, dict(rope.parameters), model.window or rope.window)


def _check_files(config: EvalConfig, model: EvalModel) -> None:
    """Refuse in a second what would fail after tokenizing or loading: weights, tokenizer, documents."""
    vocabulary = check_model(model.path).get("vocab_size")
    check_tokenizer_of(ModelConfig(path=model.path, tokenizer=model.tokenizer), vocab_size=vocabulary)
    check_text_source(config.data, config.source, "source")
    check_sources(config.data, [config.source], Path(config.cache))


def _checked(values: dict[str, Any], name: str) -> Rope:
    """Return the rope of a changed config.json. Raises UserError when the rope_type lacks a key."""
    where = f"models.{name}.rope, the command line"
    rope = rope_of(values, where)
    try:
        rope.frequencies()
    except (KeyError, TypeError, ValueError) as error:
        what = f"lacks the key {error}" if isinstance(error, KeyError) else str(error)
        raise UserError(f"rope_type={rope.kind} {what}; add it next to rope_type ({where})") from None
    return rope


def _examine_all(
    config: EvalConfig, models: dict[str, EvalModel], targets: Sequence[EvalTarget], ranks: Ranks
) -> list[EvalResult]:
    from longctx.eval.evaluate import EvalTasks, count_forwards, evaluate
    from longctx.eval.tables import beyond_window

    tasks = EvalTasks(config.needle, config.loss_lengths, config.loss_sequences)
    heldout_texts = _heldout_texts(config, models, tasks, ranks)
    out = Path(config.out) / "models" if config.out else None
    results = []
    left = {t.name: count_forwards(t, tasks, heldout_texts[t.name], out, ranks.world) for t in targets}
    if kept := [name for name, forwards in left.items() if not forwards]:
        console.say(f"{', '.join(kept)}: measured before with the same questions and text, and kept ({out})")
    ranks.barrier()  # rank 0 stores results only after all ranks have counted
    with console.progress(shown=any(left.values())) as bar:
        task = bar.add_task("", total=sum(left.values()))
        for target in targets:
            bar.update(task, description=f"needles and loss: {target.name}")
            found = evaluate(target, tasks, heldout_texts[target.name], out, ranks, lambda: bar.advance(task))
            results.append(found)
    for result in results:
        if note := beyond_window(result):
            console.remark(f"{note}; they are marked *")
    return results


def _heldout_texts(
    config: EvalConfig, models: dict[str, EvalModel], tasks: EvalTasks, ranks: Ranks
) -> dict[str, HeldoutText]:
    """Open the held-out text in each model's tokens; one rank of each node tokenizes it, and the others read it."""
    from longctx.eval.evaluate import check_text
    from longctx.eval.heldout_text import open_heldout_text

    opened: dict[str, HeldoutText] = {}

    def heldout_of(model: EvalModel) -> HeldoutText:
        tokenizer = model.tokenizer or model.path
        if tokenizer not in opened:
            opened[tokenizer] = open_heldout_text(config.data, config.source, tokenizer, Path(config.cache))
            check_text(opened[tokenizer], tasks, config.source)
        return opened[tokenizer]

    for turn in (0, 1):  # the first rank of each node, then the others
        with ranks.agree("reading the held-out text"):
            if (ranks.local_rank > 0) == turn:
                for model in models.values():
                    heldout_of(model)
    heldout_texts = {name: heldout_of(model) for name, model in models.items()}
    _check_vocabularies(models, heldout_texts)
    if len({heldout.key for heldout in heldout_texts.values()}) > 1:
        console.remark(
            "the models have different tokenizers: each is asked in its own tokens, so needles found compare, and loss "
            "per token compares only between models of one tokenizer"
        )
    return heldout_texts


def _check_vocabularies(models: dict[str, EvalModel], heldout_texts: dict[str, HeldoutText]) -> None:
    from longctx.data.stage_opening import check_vocabulary
    from longctx.model.load import read_config

    for name, model in models.items():
        try:
            check_vocabulary(heldout_texts[name].largest_id, read_config(model.path).vocab_size)
        except UserError as error:
            raise UserError(f"{name}: {error}") from None


def _write(config: EvalConfig, results: Sequence[EvalResult]) -> None:
    from longctx.eval.picture import Curve, Panel, draw
    from longctx.eval.tables import longest_curve, tables

    documents = {result.target.name: _document(result) for result in results}
    document = documents[results[0].target.name] if config.models is None else {"models": documents}
    if config.out is not None:
        out = Path(config.out)
        out.mkdir(parents=True, exist_ok=True)
        write_text(out / "eval.json", json.dumps(document, indent=1))
        panels = [Panel(result.grid, result.target.title, result.window) for result in results if result.grid]
        curves = [Curve(r.target.title, curve, r.window) for r in results if (curve := longest_curve(r))]
        title = "Needle in a haystack: six-digit values found, in percent"
        draw(panels, out / "eval.png", title=title, columns=4, curves=curves)
        console.say(f"the picture: {out / 'eval.png'}")
    if config.format == "json":
        console.emit_json(document)
        return
    for part in tables(results):
        console.emit(part)
    if config.out is None:
        console.say("nothing of this is kept; out=FOLDER keeps the numbers and the picture")


def _document(result: EvalResult) -> dict[str, Any]:
    """Return a model's part of the JSON document: lengths in tokens, losses in nats per token."""
    assert result.grid is not None
    lengths = sorted({*result.grid.lengths, *result.losses})
    return {
        "model": result.target.path,
        "window": result.window,
        "rope": result.target.rope,
        "beyond_window": [length for length in lengths if result.beyond(length)],
        "needle": result.grid.to_json(),
        "loss": result.losses,
        "loss_by_position": result.by_position,
    }
