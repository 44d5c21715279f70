"""Checks before a rank starts: they refuse every mistake that settings, files, headers and the disk show.

`check` needs neither torch nor transformers and answers in about a second. `load_checked_tokenizer` imports the
libraries that the ranks need anyway. Documents are tokenized after both.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from fnmatch import fnmatch
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longctx.console import remark
from longctx.curriculum.select import selected
from longctx.data.check import check_sources, check_text_source, sources_of
from longctx.data.stage_opening import choose_mix
from longctx.data.tokenizer import check_tokenizer_of
from longctx.decide import Machines, check_cp_by_stage, decide_all
from longctx.dtype import BYTES
from longctx.errors import UserError
from longctx.shape import Shape, shape_of_model
from longctx.storage.files import GIB, check_writable, nearest_existing, size_words
from longctx.storage.model import check_model, expected_shapes
from longctx.train.due import due
from longctx.train.runfolder import is_finished
from longctx.versions import check_versions

if TYPE_CHECKING:
    from longctx.config.data import Mix
    from longctx.config.train import EngineConfig, LoggingConfig, TrainConfig
    from longctx.curriculum import Stage


def check(config: TrainConfig, stages: Sequence[Stage], *, world: int, local_world: int) -> None:
    """Raise UserError for what would fail in every rank; the cheapest checks come first.

    world, local_world: the ranks that will train, and those of them on this node.
    """
    check_settings(config)
    shape = shape_of_model(config.model)
    heads = (shape.heads, shape.kv_heads)
    check_cp_by_stage(config.parallel, config.curriculum.stages)
    names = list(selected(config.curriculum, "configs/curriculum"))
    if config.launch.until not in (None, *names):
        raise UserError(f"launch.until={config.launch.until} is no stage of the curriculum; known: {', '.join(names)}")
    machines, own = Machines(world, local_world), due(config, stages)
    decide_all(own, config.parallel, config.engine, machines, heads, config.model.dtype)
    mixes = {stage.name: choose_mix(config.data, stage.mix, stage.name) for stage in stages}
    read = [mix for name, mix in mixes.items() if not is_finished(Path(config.folder), name)]
    later, sources = read_after_training(config)
    if config.model.path is not None:
        values = check_model(config.model.path)
        check_freeze(config.optim.freeze, _names(values))
        if dropout := values.get("attention_dropout"):
            remark(
                f"model.path={config.model.path}: config.json has attention_dropout={dropout}, and longctx trains "
                "without dropout, since its attention has none"
            )
    check_tokenizer_of(config.model, vocab_size=shape.vocab)
    check_folders(config)
    names = dict.fromkeys([*sources_of(config.data, [*read, *later]), *sources])
    size = check_sources(config.data, names, cache_folder(config))
    check_disk(config, stages, shape, source_bytes=size)


def check_settings(config: TrainConfig) -> None:
    """Raise UserError for mistakes that the settings alone show."""
    if config.model.attention != "longctx":
        raise UserError(
            f"model.attention={config.model.attention} is for evaluation and comparison: training attends through "
            "longctx, whose packed documents and ranks transformers' own kernels do not know; leave it at longctx "
            "(configs/model)"
        )
    check_engine_starts(config.engine)
    check_logging(config.logging)


def check_engine_starts(config: EngineConfig) -> None:
    """Raise UserError for a missing deepspeed."""
    if config.name == "deepspeed":
        if not find_spec("deepspeed"):
            raise UserError(
                "engine=deepspeed needs the package deepspeed; pip install 'longctx[train]', or use engine=ddp "
                "(configs/engine)"
            )
        check_versions(("deepspeed", "accelerate"))


def check_logging(config: LoggingConfig) -> None:
    """Raise UserError where wandb is wanted and not installed, or wanted online without an account."""
    if config.wandb == "disabled":
        return
    where = "or set logging.wandb=disabled (configs/logging)"
    if not find_spec("wandb"):
        raise UserError(f"logging.wandb={config.wandb} needs the package wandb; pip install wandb, {where}")
    check_versions(("wandb",))
    if config.wandb == "online" and not _wandb_knows_us():
        raise UserError(
            "logging.wandb=online has no account to log to: run `wandb login`, set WANDB_API_KEY, take "
            f"logging.wandb=offline and `wandb sync` later, {where}"
        )


def _wandb_knows_us() -> bool:
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    import wandb

    login: Any = wandb.login
    try:
        return bool(login(prompt=False))
    except TypeError:  # an older wandb, which would ask on the terminal
        return True
    except Exception:  # a key that wandb itself finds unusable
        return False


def read_after_training(config: TrainConfig) -> tuple[list[Mix], list[str]]:
    """The mixes and sources that what follows training reads. Raises UserError for one that data lacks."""
    asked, where = config.after_training, "after_training"
    mixes = [
        choose_mix(config.data, side.stage.mix or config.curriculum.mix, key=f"{where}.{key}.stage.mix")
        for key, side in asked.side_runs.values()
    ]
    sources: dict[str, str] = {}
    if asked.sibling and asked.sibling.behaviour:
        sources[asked.sibling.behaviour] = f"{where}.sibling.behaviour"
    if asked.evidence:
        sources |= dict.fromkeys(asked.evidence.beside, f"{where}.evidence.beside")
        sources[asked.evidence.source] = f"{where}.evidence.source"
    for source, key in sources.items():
        check_text_source(config.data, source, key)
    return mixes, list(sources)


def check_freeze(patterns: Sequence[str], names: Sequence[str]) -> None:
    """Raise UserError for a pattern that matches no parameter. names: training's names; empty: nothing is checked."""
    for pattern in patterns if names else ():
        if not any(fnmatch(name, pattern) for name in names):
            raise UserError(
                f"optim.freeze={pattern!r} matches no parameter; names look like {names[0]} (configs/optim)"
            )
    if names and all(any(fnmatch(name, pattern) for pattern in patterns) for name in names):
        raise UserError("optim.freeze leaves nothing to train; drop a pattern (configs/optim)")


def _names(values: dict[str, Any]) -> list[str]:
    """The names that parameters have in training, including the biases that some model families have."""
    weights = [f"model.{name}" for name in expected_shapes(values)]
    return weights + [name.removesuffix("weight") + "bias" for name in weights if "_proj" in name]


def cache_folder(config: TrainConfig) -> Path:
    """The folder of the run's tokenized documents."""
    return Path(config.cache).expanduser() if config.cache else Path(config.folder) / "data"


def check_folders(config: TrainConfig) -> None:
    """Raise UserError where the run's folder or the cache cannot be written to."""
    for folder, key in ((Path(config.folder), "run_dir"), (cache_folder(config), "cache")):
        check_writable(folder, key, folder=True)


def check_disk(config: TrainConfig, stages: Sequence[Stage], shape: Shape, *, source_bytes: int) -> None:
    """Raise UserError where a disk lacks space for what the run will write, unless `accept` has `disk`.

    A run writes checkpoints, the stages' models and tokenized documents; its side runs and the merge write as well.
    """
    if "disk" in config.accept:
        return
    run, cache = Path(config.folder), cache_folder(config)
    saved = 3 * 4.0 * shape.parameters  # weights and both moments in fp32
    left = [stage for stage in stages if not is_finished(run, stage.name)]
    kept = (config.checkpoint.keep + 1) * saved
    checkpoints = _to_write(run, kept) if left else 0.0
    model = BYTES[config.model.dtype] * shape.parameters
    sides = {name: run / "side" / name for name in config.after_training.side_runs}
    later = sum(_to_write(side, kept) + model for name, side in sides.items() if not is_finished(side, name))
    merged = model if config.after_training.sibling and not (run / "merged").exists() else 0.0
    spare = config.checkpoint.spare_gib * GIB if left else 0.0
    # A token is about four bytes of text, and two bytes of cache, or four where the vocabulary needs them.
    tokens = 0.0 if (cache / "shards").exists() else source_bytes / (2 if shape.vocab <= 2**16 else 1)
    parts = {
        f"checkpoints (checkpoint.keep={config.checkpoint.keep} and the one being written)": (run, checkpoints),
        f"the models of {len(left)} stage{'s' * (len(left) > 1)}": (run, len(left) * model),
        "side runs (after_training)": (run, later),
        "the merged sibling": (run, merged),
        "tokenized documents": (cache, tokens),
        "checkpoint.spare_gib": (run, spare),
    }
    needed: dict[int, float] = {}
    for folder, size in parts.values():
        device = nearest_existing(folder).stat().st_dev
        needed[device] = needed.get(device, 0.0) + size
    for folder in (run, cache):
        above = nearest_existing(folder)
        free, want = shutil.disk_usage(above).free, needed[above.stat().st_dev]
        if want > free:
            listed = ", ".join(f"{name} {size_words(size)}" for name, (_, size) in parts.items() if size > 0.01 * want)
            raise UserError(
                f"{folder} needs about {size_words(want)} and its disk has {size_words(free)} free: {listed}. Free "
                "some space, name another disk with run_dir= or cache=, set checkpoint.keep=1, or start anyway with "
                "'accept=[disk]' (configs/train.yaml)"
            )


def _to_write(run: Path, kept: float) -> float:
    """The bytes of checkpoints that a run has still to write, of `kept` that it will keep."""
    return max(0.0, kept - sum(file.stat().st_size for file in run.glob("stages/*/checkpoints/*/*.safetensors")))


def load_checked_tokenizer(config: TrainConfig) -> Any:
    """Check the device, the model's config and the tokenizer with torch and transformers; return the tokenizer."""
    from longctx.data.tokenizer import load_tokenizer
    from longctx.distributed.ranks import choose_device
    from longctx.model.architectures import check_config
    from longctx.model.load import check_builds, config_of, read_config

    choose_device(config.engine.device, 0)
    if config.model.path is not None:
        hf = read_config(config.model.path)
        check_config(hf, config.model.path)
        check_builds(hf, config.model.path)
    else:
        assert config.model.init is not None
        hf = config_of(config.model.init)
    tokenizer = load_tokenizer(config.model, vocab_size=int(hf.vocab_size))
    check_chat_template(config, tokenizer)
    return tokenizer


def check_chat_template(config: TrainConfig, tokenizer: Any) -> None:
    """Raise UserError where conversations are measured after training and the tokenizer has no chat template."""
    asked = config.after_training
    read = {"evidence.beside=[]": list(asked.evidence.beside) if asked.evidence else []}
    read["sibling.behaviour=null"] = [asked.sibling.behaviour] if asked.sibling and asked.sibling.behaviour else []
    for without, names in read.items():
        chat = next((name for name in names if config.data.sources[name].kind == "chat"), None)
        if chat is not None and not getattr(tokenizer, "chat_template", None):
            raise UserError(
                f"source {chat}, which after_training reads, holds conversations, and the model's tokenizer has no "
                f"chat template; take an instruct model, or leave it out with 'after_training.{without}'"
            )
