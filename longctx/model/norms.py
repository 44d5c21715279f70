"""RMSNorm in fp64 for fp64 models: transformers' rounds its input to fp32 whatever the model's type.

With it an fp64 model is an oracle to 1e-10; without it, to 1e-8 at best.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from torch import Tensor, nn


class _Exact:
    def forward(self, hidden_states: Tensor) -> Tensor:
        module: Any = self
        eps = module.variance_epsilon if hasattr(module, "variance_epsilon") else module.eps
        scale = 1.0 + module.weight if type(self).__name__.startswith("ExactGemma") else module.weight
        variance = hidden_states.square().mean(-1, keepdim=True)
        return hidden_states * (variance + eps).rsqrt() * scale


def keep_norms_exact(model: nn.Module) -> None:
    """Make every RMSNorm of `model` compute in its input's type, in place; names and weights stay."""
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm") and not isinstance(module, _Exact):
            module.__class__ = _exact(type(module))


@cache
def _exact(norm: type) -> type:
    return type(f"Exact{norm.__name__}", (_Exact, norm), {})
