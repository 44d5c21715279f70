"""What a model's config.json says about its rotary embedding, in one form.

Reads transformers' present style (`rope_parameters`) and the older one (`rope_theta` beside `rope_scaling`)
as plain JSON; a model without rotary embeddings, or with several kinds of them, is refused with its reason.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longctx.errors import UserError
from longctx.rope.frequencies import ROPE_TYPES, Frequencies, inv_freq, rotary_dim
from longctx.storage.model import read_config

if TYPE_CHECKING:
    from longctx.config.model import InitConfig

# Architectures that rotate without saying so in old config.json files, all with theta 10000.
_SILENT = {"llama", "mistral", "gpt_neox", "phi", "qwen2", "stablelm", "internlm", "baichuan", "falcon"}


@dataclass(frozen=True)
class Rope:
    """A model's rotary embedding: transformers' rope_parameters, the head's size, the window it was made for.

    parameters: at least rope_type and rope_theta. window: tokens. source: the file, for messages.
    """

    parameters: Mapping[str, Any]
    head_dim: int
    window: int
    source: str = "the model's config.json"

    @property
    def kind(self) -> str:
        return self.parameters["rope_type"]

    @property
    def theta(self) -> float:
        return self.parameters["rope_theta"]

    @property
    def dim(self) -> int:
        """Rotary dimension d."""
        return rotary_dim(self.parameters, self.head_dim)

    def frequencies(self, dtype: Any = "float64") -> Frequencies:
        """Inverse frequencies [d/2] for a sequence as long as the window."""
        return inv_freq(self.parameters, self.head_dim, window=self.window, length=self.window, dtype=dtype)

    def note(self) -> str | None:
        """What it means that this rope is already scaled, or None when it is plain."""
        factor = self.parameters.get("factor")
        original = self.parameters.get("original_max_position_embeddings")
        told = {
            "linear": f"positions are divided by {factor}; theta rules keep that and stretch on top of it",
            "dynamic": "theta grows with the sequence at run time; a training stage fixes it, so the result is plain",
            "yarn": f"slow dimensions are already stretched {factor}x from {original}; theta rules keep "
            "that ramp and raise theta, rule yarn raises the factor instead",
            "llama3": f"wavelengths above {original} are already stretched {factor}x; theta rules keep that "
            f"and raise theta, and lengths count from the served window {self.window}, not from {original}",
            "longrope": "its factors per dimension belong to its theta; only an explicit theta or new factors apply",
            "proportional": "part of the dimensions never turns; only an explicit theta applies",
        }
        return f"this model's rope is already {self.kind}: {told[self.kind]}" if self.kind in told else None


def read_rope(path: str | Path) -> Rope:
    """The rope of the model at `path` (a folder with config.json, or the file itself); reads nothing else.

    Raises UserError when there is no such file, no rotary embedding, or several.
    """
    folder = Path(path).parent if Path(path).name == "config.json" else Path(path)
    return rope_of(*read_config(str(folder)))


def rope_of_init(init: InitConfig) -> Rope:
    """The rope of a model that is drawn at random."""
    rope = {"rope_type": "default", "rope_theta": init.theta}
    return Rope(rope, init.head_dim or init.hidden // init.heads, init.window, "model.init")


def rope_of(config: Mapping[str, Any], source: str) -> Rope:
    """The rope in a config.json's content, as it stands or as transformers' config.to_dict() gives it."""
    if isinstance(config.get("text_config"), Mapping):
        config = {**config["text_config"], "model_type": config["text_config"].get("model_type", "text")}
    parameters = _parameters(config, source)
    kind = parameters["rope_type"]
    if kind not in ROPE_TYPES:
        raise UserError(
            f"rope_type={kind!r} is not one longctx knows ({', '.join(ROPE_TYPES)}); this model cannot be "
            f"extended by a rule ({source})"
        )
    heads = config.get("num_attention_heads")
    head_dim = config.get("head_dim") or (config["hidden_size"] // heads if heads else None)
    window = config.get("max_position_embeddings")
    if not head_dim or not window:
        missing = "max_position_embeddings" if head_dim else "head_dim (or hidden_size and num_attention_heads)"
        raise UserError(f"{missing} is missing, without it no rule has a starting point; add it ({source})")
    if kind in ("yarn", "llama3", "longrope"):
        original = config.get("original_max_position_embeddings", window)
        parameters.setdefault("original_max_position_embeddings", original)
    if kind == "yarn":
        served = int(parameters["original_max_position_embeddings"] * (parameters.get("factor") or 1))
        window = max(window, served)
    return Rope(parameters, int(head_dim), int(window), source)


def _parameters(config: Mapping[str, Any], source: str) -> dict[str, Any]:
    found = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = config.get("rope_theta", config.get("rotary_emb_base"))
    if found and all(isinstance(value, Mapping) or value is None for value in found.values()):
        raise UserError(
            f"rope_parameters differ by layer ({', '.join(found)}); one rule cannot extend several ropes at "
            f"once, and longctx extends only models with one ({source})"
        )
    if not found and theta is None and config.get("model_type") not in _SILENT:
        raise UserError(
            f"model_type={config.get('model_type')!r} has no rotary position embedding (neither "
            "rope_parameters nor rope_theta stands in its config), so there is no theta to change; longctx "
            f"extends rotary models only ({source})"
        )
    parameters = {key: value for key, value in found.items() if key != "type"}
    parameters["rope_type"] = found.get("rope_type") or found.get("type") or "default"
    parameters.setdefault("rope_theta", theta if theta is not None else 10000)
    partial = config.get("partial_rotary_factor", config.get("rotary_pct"))
    if partial is not None and partial != 1.0:
        parameters.setdefault("partial_rotary_factor", partial)
    return {
        "rope_type": parameters.pop("rope_type"),
        "rope_theta": parameters.pop("rope_theta"),
        **parameters,
    }
