"""The first line on the screen of a verb that works for more than a few seconds, written before torch is imported."""

from __future__ import annotations

import os
from typing import Any


def opening(verb: str, config: Any) -> str | None:
    """The first thing that a verb does with this config, in words; None for a verb that answers at once."""
    match verb:
        case "train":
            return f"{config.name}: {_starting(config.launch.nproc, config.model.path)}"
        case "theta" if config.search:
            return f"{config.name}: {_starting(config.nproc, config.model and config.model.path)}"
        case "eval":
            return "loading the model and its text"
        case "data" | "data stats":
            return f"looking for the shards of {', '.join(config.data.sources)} in {config.shards}"
        case "data synth":
            return f"looking for the shards of {config.haystack} in {config.cache}"
        case "lora extract":
            return f"comparing {config.tuned} with {config.base}"
        case "lora merge":
            return f"reading {config.target}"
        case "import":
            return f"reading {config.gguf}"
    return None


def _starting(nproc: int, model: str | None) -> str:
    if nproc > 1 and "WORLD_SIZE" not in os.environ:
        return f"checking, then starting {nproc} ranks"
    return f"loading {model or 'a new model'}"
