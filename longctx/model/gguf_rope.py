"""Reads the scaling of a GGUF file's rope, which transformers leaves out: it reads theta and the window alone.

llama.cpp states linear and yarn in keys `ARCH.rope.scaling.*`, and Llama 3.1's rule as a tensor rope_freqs.weight [d/2]
of the factors by which each pair's frequency is divided. A scaling that has no counterpart here is refused, because the
model would compute other angles than it was trained with.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from longctx.errors import UserError
from longctx.rope.checks import ORIGINAL
from longctx.rope.frequencies import inv_freq

# What llama.cpp's converter writes besides type, factor and original length, and the values that change nothing.
_NEUTRAL = {
    "finetuned": None, "attn_factor": 1.0, "alpha": 0.0, "yarn_ext_factor": 1.0, "yarn_attn_factor": 1.0,
    "yarn_log_multiplier": 0.0,
}  # fmt: skip
_BETAS = {"yarn_beta_fast": "beta_fast", "yarn_beta_slow": "beta_slow"}
# Llama 3.1's: they are not in the file, and every published model of the rule has them.
_LOW, _HIGH = 1.0, 4.0


def scaled_rope(file: Path, rope: Mapping[str, Any], window: int, head_dim: int) -> tuple[dict[str, Any], int]:
    """The rope_parameters and the window of a GGUF file. rope, window: its theta and length, read by transformers.

    Raises UserError for a scaling that cannot be stated as rope_parameters.
    """
    from gguf import GGUFReader

    reader = GGUFReader(str(file))
    architecture = reader.fields["general.architecture"].contents()
    prefix = f"{architecture}.rope.scaling."
    stated = {name.removeprefix(prefix): f.contents() for name, f in reader.fields.items() if name.startswith(prefix)}
    if older := reader.fields.get(f"{architecture}.rope.scale_linear"):
        stated.setdefault("factor", older.contents())
    factors = {t.name: np.array(t.data, np.float64) for t in reader.tensors if t.name.startswith("rope_f")}
    kind = stated.pop("type", "linear" if stated.get("factor") else "none")
    if factors:
        if list(factors) != ["rope_freqs.weight"] or kind != "none":
            raise _unknown(file, f"{', '.join(factors)} with rope.scaling.type={kind}")
        return _llama3(file, rope, window, head_dim, factors["rope_freqs.weight"]), window
    factor = float(stated.pop("factor", 0) or 1)
    if kind == "none" or (kind == "linear" and factor == 1):
        return dict(rope), window
    original = int(stated.pop("original_context_length", 0) or window)
    betas = {ours: stated.pop(theirs) for theirs, ours in _BETAS.items() if theirs in stated}
    odd = [f"{name}={value}" for name, value in stated.items() if _NEUTRAL.get(name, value) != value]
    odd += [name for name in stated if name not in _NEUTRAL]
    if kind not in ("linear", "yarn") or odd:
        raise _unknown(file, ", ".join([f"rope.scaling.type={kind}", *odd]))
    scaled = {**rope, "rope_type": kind, "factor": factor}
    if kind == "linear":
        return scaled, window
    return {**scaled, ORIGINAL: original, **betas}, max(window, int(original * factor))


def _llama3(file: Path, rope: Mapping[str, Any], window: int, head_dim: int, factors: np.ndarray) -> dict[str, Any]:
    """The llama3 rope whose frequencies are the plain ones over these factors [d/2].

    The original length L0 follows from a pair between the two bounds: 1/f = (1-t)/F + t with t = (L0/lambda - 1)/3.
    """
    plain, factor = inv_freq({"rope_type": "default", **rope}, head_dim, window=window), float(factors.max())
    if factors.size != plain.size:
        raise _unknown(file, f"rope_freqs.weight of {factors.size} numbers for {plain.size} pairs")
    if factor == 1 == factors.min():
        return dict(rope)
    between = np.flatnonzero((factors > 1) & (factors < factor))
    for pair in between[:1]:
        smooth = (1 / factors[pair] - 1 / factor) / (1 - 1 / factor)
        original = round(2 * math.pi / plain[pair] * (_LOW + (_HIGH - _LOW) * smooth))
        found = {
            **rope, "rope_type": "llama3", "factor": round(factor, 4), "low_freq_factor": _LOW,
            "high_freq_factor": _HIGH, ORIGINAL: original,
        }  # fmt: skip
        if original > 0 and np.allclose(plain / inv_freq(found, head_dim, window=window), factors, rtol=1e-4):
            return found
    raise _unknown(file, "rope_freqs.weight, which is not Llama 3.1's rule")


def _unknown(file: Path, what: str) -> UserError:
    return UserError(
        f"gguf={file}: its rope is scaled in a way that cannot be written into a config.json ({what}), and without it "
        "the model would read its positions wrongly; take the model's folder in Hugging Face format"
    )
