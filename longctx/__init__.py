"""longctx extends a language model's context window, and proves that it did.

Public names are loaded on first use, so that `import longctx` needs neither CUDA nor network, and
`longctx theta` does not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from longctx.attention import ContextParallel as ContextParallel
    from longctx.attention import context_attention as context_attention
    from longctx.eval.notebook import NeedleGrid as NeedleGrid
    from longctx.eval.notebook import needle_grid as needle_grid

__version__ = "0.1.0"

_PUBLIC = {
    "ContextParallel": "longctx.attention",
    "NeedleGrid": "longctx.eval.notebook",
    "context_attention": "longctx.attention",
    "needle_grid": "longctx.eval.notebook",
}

__all__ = ["ContextParallel", "NeedleGrid", "__version__", "context_attention", "needle_grid"]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'longctx' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
