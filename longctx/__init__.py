"""longctx extends a language model's context window, and proves that it did.

    rope_for, set_rope                        which theta a window asks for, and a model that has it
    ContextParallel, Layout                   the ranks that share a sequence, and which tokens each of them holds
    context_attention                         exact causal attention over those ranks
    prepare, LossModel, shard_batch           any supported transformers model in your own training loop
    load_curriculum, plan                     stages in numbers; their memory, time and schedule before they run
    extract_lora, merge_lora                  the extension as an adapter, and into any fine-tune of the same base
    needle_grid, NeedleGrid                   what the model finds, by length and depth

Every name has a docstring with an example, and docs/api.md has them on one page. Names are loaded on first use, so that
`import longctx` needs neither CUDA nor network and imports neither torch nor transformers. Mistakes in arguments raise
ValueError in words that say what to do.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from longctx.attention import ContextParallel as ContextParallel
    from longctx.attention import Layout as Layout
    from longctx.attention import context_attention as context_attention
    from longctx.eval.notebook import NeedleGrid as NeedleGrid
    from longctx.eval.notebook import needle_grid as needle_grid
    from longctx.library.adapters import extract_lora as extract_lora
    from longctx.library.adapters import merge_lora as merge_lora
    from longctx.library.ropes import rope_for as rope_for
    from longctx.library.ropes import set_rope as set_rope
    from longctx.library.stages import load_curriculum as load_curriculum
    from longctx.library.stages import plan as plan
    from longctx.library.training import prepare as prepare
    from longctx.library.training import shard_batch as shard_batch
    from longctx.model import LossModel as LossModel

__version__ = "0.1.0"

_PUBLIC = {
    "ContextParallel": "longctx.attention",
    "Layout": "longctx.attention",
    "LossModel": "longctx.model",
    "NeedleGrid": "longctx.eval.notebook",
    "context_attention": "longctx.attention",
    "extract_lora": "longctx.library.adapters",
    "load_curriculum": "longctx.library.stages",
    "merge_lora": "longctx.library.adapters",
    "needle_grid": "longctx.eval.notebook",
    "plan": "longctx.library.stages",
    "prepare": "longctx.library.training",
    "rope_for": "longctx.library.ropes",
    "set_rope": "longctx.library.ropes",
    "shard_batch": "longctx.library.training",
}

__all__ = [
    "ContextParallel",
    "Layout",
    "LossModel",
    "NeedleGrid",
    "__version__",
    "context_attention",
    "extract_lora",
    "load_curriculum",
    "merge_lora",
    "needle_grid",
    "plan",
    "prepare",
    "rope_for",
    "set_rope",
    "shard_batch",
]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'longctx' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
