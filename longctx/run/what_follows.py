"""Checks of what follows training, made before it: training may take days, and nothing after it should then be refused.

`check_what_follows` reads settings, files and headers. `check_evidence_fits` estimates the memory of the evidence.
`prepare_what_follows` tokenizes the documents that side runs and evidence read.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from longctx import console
from longctx.config.train import TrainConfig
from longctx.decide import Machines, decide_all
from longctx.errors import UserError
from longctx.planner.evidence import check_evidence_memory, flop_of, needs_of
from longctx.rope.config import describe_rope, rope_to_carry
from longctx.run.side_config import side_config
from longctx.shape import config_json, model_type_of, shape_of_model
from longctx.storage.model import check_model, expected_shapes
from longctx.storage.model_files import Folder, open_source
from longctx.train.train import prepare_data, resolve_stages

if TYPE_CHECKING:
    from longctx.curriculum import Stage

MUCH = 3  # times as long as training: evidence that a user is told about


def check_what_follows(config: TrainConfig) -> None:
    """Raise UserError for a side run that cannot be trained, and for a sibling that cannot take the adapter."""
    for name, (key, side) in config.after_training.side_runs.items():
        own = side_config(config, Path(config.folder), name, side)
        shape, nproc = shape_of_model(own.model), own.launch.nproc
        with named_as_asked(name, key):
            heads = (shape.heads, shape.kv_heads)
            machines = Machines(nproc, nproc)
            decide_all(resolve_stages(own), own.parallel, own.engine, machines, heads, own.model.dtype)
    sibling = config.after_training.sibling
    if sibling is not None and sibling.path is not None:
        _check_sibling(config, sibling.path)


def check_evidence_fits(config: TrainConfig, stages: Sequence[Stage], world: int) -> None:
    """Raise UserError where the evidence's longest sequence does not fit this machine; world: the ranks that train.

    A line is printed where the evidence computes much longer than training. config: a settled one.
    """
    asked = config.after_training.evidence
    if asked is None:
        return
    from longctx.train.machine import device_type, room_here

    device, shape = device_type(config.engine), shape_of_model(config.model)
    if "memory" not in config.accept:
        needs = needs_of(asked, shape, config.model.dtype, device, len(os.sched_getaffinity(0)))
        check_evidence_memory(needs, room_here(Machines(1, 1), device, "").device_bytes, device)
    flops = shape.flops()
    training = sum(flops.model(stage.tokens, stage.tokens * stage.seq_len / 2) for stage in stages)
    times = flop_of(config, asked, shape, len(stages)) / training * (world if device == "cuda" else 1)
    if times > MUCH:
        console.remark(
            f"after_training.evidence takes about {times:.0f} times as long as training; one process measures it, and "
            "fewer or shorter needle.lengths, a smaller needle.per_cell or fewer needle.seeds take less "
            "(configs/after_training)"
        )


def prepare_what_follows(config: TrainConfig, tokenizer: Any) -> None:
    """Tokenize the documents of unfinished side runs and of the evidence; tokenizer: the run's.

    Raises UserError for documents with which they cannot be made, for a side run that needs more memory than its
    devices have, and for a tokenizer that is not the base's where an adapter is made.
    """
    from longctx.train.machine import check_machine

    for name, (key, side) in config.after_training.side_runs.items():
        own = side_config(config, Path(config.folder), name, side)
        with named_as_asked(name, key):
            stages = resolve_stages(own)
            check_machine(own, stages, own.launch.nproc, own.launch.nproc)
            prepare_data(own, stages, tokenizer)
    asked = config.after_training
    if asked.lora.enabled and config.model.path is not None:
        _check_vocabulary(config, str(config.model.path), tokenizer)
    if asked.evidence is not None:
        from longctx.run.evidence import check_evidence

        check_evidence(config, asked.evidence, str(config.model.tokenizer or config.model.path))


def _check_vocabulary(config: TrainConfig, base: str, tokenizer: Any) -> None:
    """Raise UserError where the exported tokenizer has other tokens than the base's, from which no adapter is made."""
    from longctx.lora.modules import differing_vocabulary

    with TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        differing = differing_vocabulary(open_source(base, "model.path"), Folder(Path(folder)))
    if differing is None:
        return
    file, tokens = differing
    if config.model.tokenizer:
        given, remedy = f"model.tokenizer={config.model.tokenizer}", "train with the model's own tokenizer"
    else:
        added = [name for name, token in tokenizer.special_tokens_map.items() if repr(token) in tokens]
        given = "the same one as transformers loads it"
        remedy = (
            f"in tokenizer_config.json set {' and '.join(added) or 'the special tokens among them'} to null or to a "
            f"token of {file} (of a hub id, in a copy of its tokenizer, with model.tokenizer=)"
        )
    raise UserError(
        f"model.path={base}: its {file} has other tokens than the tokenizer of this run ({given})"
        f"{tokens and f': {tokens} (id there / here)'}; the adapter is a difference of models whose rows mean the same "
        f"tokens; {remedy}, or take after_training=none (configs/after_training)"
    )


@contextmanager
def named_as_asked(name: str, key: str) -> Iterator[None]:
    """Name a side run's stage in errors by the key that made it."""
    try:
        yield
    except UserError as error:
        said = str(error).replace(f"curriculum.stages.{name}", f"after_training.{key}.stage")
        raise UserError(said.replace("(configs/curriculum)", "(configs/after_training)")) from None


def _check_sibling(config: TrainConfig, path: str) -> None:
    """Raise UserError for a sibling whose layers are not the base's, or that has the last stage's rope and window."""
    key = "after_training.sibling.path"
    values, base = check_model(path, key), config_json(str(config.model.path))[0]
    ours, theirs = ({**_layers(model), "model_type": model_type_of(model)} for model in (base, values))
    differing = [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
    if differing:
        name, more = differing[0], f" and {len(differing) - 1} more" if len(differing) > 1 else ""
        raise UserError(
            f"{key}={path} is no fine-tune of model.path={config.model.path}: {name} is {theirs.get(name)} there and "
            f"{ours.get(name)} in the base{more}; name another fine-tune of the base (configs/after_training)"
        )
    last, (rope, window) = resolve_stages(config)[-1], rope_to_carry(values, f"{key}={path}, config.json")
    if (rope, window) == (last.rope, last.window):
        raise UserError(
            f"{key}={path} has the rope and window of the last stage already ({describe_rope(rope)}, {window}), and "
            "merging the adapter would add the extension twice; name a fine-tune that is not extended "
            "(configs/after_training)"
        )


def _layers(model: dict[str, Any]) -> dict[str, Any]:
    """The shapes of the weights inside layers, by name, and the number of heads."""
    shapes: dict[str, Any] = {name: shape for name, shape in expected_shapes(model).items() if ".layers." in name}
    return {"num_attention_heads": model.get("num_attention_heads"), **shapes}
