"""Reads and writes the rope section and the window of a config.json; no other module does.

Reading follows transformers 5.23 (RotaryEmbeddingConfigMixin). A non-empty rope_scaling replaces rope_parameters. Keys
that the section lacks come from the top level, then from the architecture's configuration class. `type` replaces a
missing rope_type. A top-level original_max_position_embeddings wins over the section's. A section from which
transformers cannot build a model is refused. Writing states the section both as transformers 5 reads it and as older
readers do.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longctx.errors import UserError
from longctx.rope.checks import ORIGINAL, check_rope, is_number
from longctx.rope.frequencies import ROPE_TYPES, Frequencies, inv_freq, rotary_dim
from longctx.shape import DEFAULTS, config_json, head_dim_of, integer, model_type_of, shape_of_init, text_section

if TYPE_CHECKING:
    from longctx.config.model import InitConfig, ModelConfig

Parameters = dict[str, Any]

# The theta of architectures whose config.json may leave rope_theta out (_SILENT).
_DEFAULT_THETA = 10000.0
_SILENT = {*DEFAULTS, "gpt_neox", "phi", "phi3", "stablelm", "internlm", "baichuan", "falcon"}
# Architectures that rotate part of a head, with the share they use if config.json has none; others rotate all of it.
PARTIAL = {
    "bamba": 0.5, "glm": 0.5, "glm4": 0.5, "glm4_moe": 0.5, "glm4_moe_lite": 1.0, "glm4v": 1.0, "glm4v_moe": 0.5,
    "glm_image": 1.0, "glm_ocr": 1.0, "gpt_neox": 0.25, "gpt_neox_japanese": 1.0, "minimax_m2": 1.0, "moonshine": 0.9,
    "nemotron": 0.5, "persimmon": 0.5, "phi": 0.5, "phi3": 1.0, "phi4_multimodal": 1.0, "qwen3_5": 0.25,
    "qwen3_5_moe": 0.25, "qwen3_next": 0.25, "recurrent_gemma": 0.5, "solar_open": 1.0, "stablelm": 0.25,
}  # fmt: skip
_NEOX = {"gpt_neox", "gpt_neox_japanese"}  # rotary_emb_base and rotary_pct in place of the usual keys
_CHECKED_FIRST = {"yarn", "llama3"}  # transformers checks the section's own original length before a top-level one wins
_PHI3 = {"phi3", "phi4_multimodal"}  # their class always has a top-level original_max_position_embeddings
# Architectures with one rope for sliding and one for full attention; rope_scaling applies to the latter. Values: the
# theta of full attention, the key of the sliding theta in older files, and that theta.
_LAYERED = {
    "gemma3": (1e6, "rope_local_base_freq", 1e4),
    "gemma3n": (1e6, "rope_local_base_freq", 1e4),
    "olmo3": (5e5, "", 5e5),
}

_HAS_ORIGINAL = ("yarn", "llama3", "longrope")


@dataclass(frozen=True)
class Rope:
    """A model's rotary embedding: transformers' rope_parameters, the size of a head, and the window.

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
        """The rotary dimension d."""
        return rotary_dim(self.parameters, self.head_dim)

    def frequencies(self, dtype: Any = "float64") -> Frequencies:
        """Inverse frequencies [d/2] for a sequence as long as the window."""
        return inv_freq(self.parameters, self.head_dim, window=self.window, length=self.window, dtype=dtype)

    def note(self) -> str | None:
        """A sentence that says how rules treat this rope if it is scaled already, or None for a plain rope."""
        factor = self.parameters.get("factor")
        original = self.parameters.get(ORIGINAL)
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
    """Read the rope of the model in a folder or at a hub id, from its config.json alone.

    Raises UserError when the file does not exist, and when the model has no rotary embedding, several of them, or one
    that transformers refuses.
    """
    return rope_of(*config_json(path))


def rope_of_model(model: ModelConfig) -> Rope:
    """The rope of the model that `model` loads or initialises."""
    return rope_of_init(model.init) if model.init is not None else read_rope(str(model.path))


def rope_of_init(init: InitConfig) -> Rope:
    """The rope of a randomly initialised model."""
    rope = {"rope_type": "default", "rope_theta": init.theta}
    return Rope(rope, shape_of_init(init).head_dim, init.window, "model.init")


def rope_of(config: Mapping[str, Any], source: str) -> Rope:
    """The rope in a config.json's content, or in transformers' config.to_dict(); raises UserError like read_rope."""
    inner, family = text_section(config), model_type_of(config)
    parameters, window = rope_section(config, source)
    if is_nested(parameters):
        raise UserError(
            f"rope_parameters differ by layer ({', '.join(parameters)}); one rule cannot extend several ropes at "
            f"once, and longctx extends only models with one ({source})"
        )
    named = any(inner.get(key) for key in ("rope_parameters", "rope_scaling"))
    if not named and "rope_theta" not in parameters:
        raise UserError(
            f"model_type={inner.get('model_type')!r} has no rotary position embedding (neither rope_parameters nor "
            "rope_theta stands in its config), so there is no theta to change; longctx extends rotary models only "
            f"({source})"
        )
    head_dim = head_dim_of(config, source)
    if window is None:
        raise UserError(
            f"max_position_embeddings is missing, without it no rule has a starting point; add it ({source})"
        )
    check_rope(parameters, head_dim, family, source)
    return Rope(parameters, head_dim, window, source)


def rope_section(config: Mapping[str, Any], source: str) -> tuple[Parameters, int | None]:
    """The rope_parameters and the window (tokens) of a config.json's content, in one form for both styles of keys.

    Ropes that differ by layer stay a dict of dicts. If neither the file nor the architecture gives a theta or a window,
    rope_theta is left out and the window is None. Raises UserError for a section that is no dict and for a window that
    is no number; rope_of checks the values in the section.

    The window is max_position_embeddings, except for a yarn rope whose original_max_position_embeddings x factor is
    longer: such files keep the length before the extension (Qwen2.5's model card, vLLM).
    """
    inner, family = text_section(config), model_type_of(config)
    section = _layered(inner, family, source) if family in _LAYERED else _section(inner, source)
    known = DEFAULTS.get(family)
    window = known.window if known else None
    if "max_position_embeddings" in inner:
        window = integer(inner, "max_position_embeddings", source)
    if is_nested(section):
        return section, window
    kind = section.get("rope_type", section.get("type", "default"))
    parameters: Parameters = {"rope_type": kind, **_theta(inner, section, family)}
    parameters.update({key: value for key, value in section.items() if key != "type" and key not in parameters})
    share = _share(inner, section, family)
    parameters.pop("partial_rotary_factor", None)
    if share != 1.0 and (family in PARTIAL or kind != "default"):
        parameters["partial_rotary_factor"] = share
    if kind in _HAS_ORIGINAL:
        refused = kind in _CHECKED_FIRST and section.get(ORIGINAL, 0) is None
        if ORIGINAL in inner and not refused:
            parameters[ORIGINAL] = inner[ORIGINAL]
        elif family in _PHI3:
            parameters[ORIGINAL] = 4096
        else:
            parameters.setdefault(ORIGINAL, window)
    return parameters, _served(parameters, window)


def rope_to_carry(config: Mapping[str, Any], source: str) -> tuple[Parameters, int | None]:
    """rope_section as an adapter records it: a rope that longctx knows is checked, any other is copied unchanged."""
    parameters, window = rope_section(config, source)
    known = not is_nested(parameters) and parameters["rope_type"] in ROPE_TYPES and "rope_theta" in parameters
    if known:
        check_rope(parameters, head_dim_of(config, source), model_type_of(config), source)
    return parameters, window


def with_rope(config: Mapping[str, Any], rope: Mapping[str, Any], window: int) -> dict[str, Any]:
    """A copy of a config.json's content with `rope` and a window of `window` tokens in place of the old ones.

    rope: rope_parameters, or a dict of them by kind of layer. Keys of either style that would change what transformers
    5 reads back are overwritten or removed.
    """
    changed = dict(config)
    inner, family = changed, model_type_of(config)
    if isinstance(config.get("text_config"), Mapping):
        inner = changed["text_config"] = dict(config["text_config"])
    if is_nested(rope):
        inner.update(new_keys(rope, window))
        old = old_keys(_main(rope), window)
        inner.update(old if family in _LAYERED else {**old, "rope_scaling": None})
        return changed
    rope = dict(rope)
    if family in PARTIAL:
        rope.setdefault("partial_rotary_factor", 1.0)
    elif family in DEFAULTS:  # rotates whole heads, but transformers would use the share of a scaled rope
        inner.pop("partial_rotary_factor", None)
        if rope.get("rope_type", "default") != "proportional":
            rope.pop("partial_rotary_factor", None)
    if family in _NEOX:
        inner.update(rotary_emb_base=rope["rope_theta"], rotary_pct=rope["partial_rotary_factor"])
    if ORIGINAL in rope and (ORIGINAL in inner or family in _PHI3):
        inner[ORIGINAL] = rope[ORIGINAL]
    else:
        inner.pop(ORIGINAL, None)
    inner.update({**new_keys(rope, window), **old_keys(rope, window)})
    return changed


def new_keys(rope: Mapping[str, Any], window: int) -> dict[str, Any]:
    """The keys as transformers 5 reads them, with everything in `rope_parameters`."""
    return {"max_position_embeddings": int(window), "rope_parameters": dict(rope)}


def old_keys(rope: Mapping[str, Any], window: int) -> dict[str, Any]:
    """The keys as transformers 4, vLLM and llama.cpp read them: `rope_theta` and `rope_scaling`."""
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    kind = scaling.get("rope_type", "default")
    keys: dict[str, Any] = {"max_position_embeddings": int(window)}
    if "rope_theta" in rope:
        keys["rope_theta"] = rope["rope_theta"]
    if "partial_rotary_factor" in rope:
        keys["partial_rotary_factor"] = rope["partial_rotary_factor"]
    return {**keys, "rope_scaling": None if kind == "default" else {**scaling, "type": kind}}


def describe_rope(rope: Mapping[str, Any]) -> str:
    """Describe a rope in a few words: `theta 15,296,098`, or `yarn, theta 10,000, factor 4.0`."""
    plain = _main(rope)
    theta = plain.get("rope_theta")
    words = [] if plain.get("rope_type", "default") == "default" else [str(plain["rope_type"])]
    words += [f"theta {theta:,.10g}"] if theta is not None else []
    words += [f"factor {plain['factor']}"] if plain.get("factor") is not None else []
    return ", ".join(words)


def is_nested(rope: Mapping[str, Any]) -> bool:
    """Whether `rope` is a dict of ropes by kind of layer; a kind without a rope has null."""
    return bool(rope) and all(isinstance(value, Mapping) or value is None for value in rope.values())


def _main(rope: Mapping[str, Any]) -> Mapping[str, Any]:
    """The rope itself, or the rope of full attention if layers have different ones."""
    if not is_nested(rope):
        return rope
    return rope.get("full_attention") or next((value for value in rope.values() if value), {})


def _section(inner: Mapping[str, Any], source: str) -> Parameters:
    return _object(inner, "rope_scaling", source) or _object(inner, "rope_parameters", source)


def _layered(inner: Mapping[str, Any], family: str, source: str) -> Parameters:
    theta, key, local = _LAYERED[family]
    found, scaling = _object(inner, "rope_parameters", source), _object(inner, "rope_scaling", source)
    thetas = {"sliding_attention": inner.get(key, local), "full_attention": inner.get("rope_theta", theta)}
    layers: Parameters = {}
    for name, own in thetas.items():
        section = {**(found.get(name) or {"rope_type": "default"}), **(scaling if name == "full_attention" else {})}
        kind = section.get("rope_type", section.get("type", "default"))
        rest = {key: value for key, value in section.items() if key != "type"}
        layers[name] = {"rope_theta": own, **rest, "rope_type": kind}
    return layers


def _object(inner: Mapping[str, Any], key: str, source: str) -> Parameters:
    found = inner.get(key)
    if found is not None and not isinstance(found, Mapping):
        raise UserError(
            f"{key}={json.dumps(found)} is not an object with rope_type and its numbers; write one, or leave the "
            f"key out ({source})"
        )
    return dict(found or {})


def _theta(inner: Mapping[str, Any], section: Mapping[str, Any], family: str) -> Parameters:
    """The rope_theta of the section, or of the top level, or of the architecture; empty if none of them has one."""
    top = "rotary_emb_base" if family in _NEOX else "rope_theta"
    if "rope_theta" in section:
        return {"rope_theta": section["rope_theta"]}
    if top in inner:
        return {"rope_theta": inner[top]}
    return {"rope_theta": _DEFAULT_THETA} if family in _SILENT else {}


def _share(inner: Mapping[str, Any], section: Mapping[str, Any], family: str) -> Any:
    """The share of a head that rotates: partial_rotary_factor of the section, the top level, or the architecture."""
    if "partial_rotary_factor" in section:
        return section["partial_rotary_factor"]
    top = inner.get("rotary_pct" if family in _NEOX else "partial_rotary_factor")
    return PARTIAL.get(family, 1.0) if top is None else top


def _served(parameters: Mapping[str, Any], window: int | None) -> int | None:
    factor, original = parameters.get("factor"), parameters.get(ORIGINAL)
    if parameters["rope_type"] == "yarn" and window is not None and is_number(factor) and is_number(original):
        return max(window, int(original * factor))
    return window
