"""Reads adapter_config.json as PEFT 0.21 does: the modules that an adapter changes, with their ranks and scales.

Every key of PEFT's LoraConfig is in one of three tables: honoured, without effect on a loaded adapter, or refused if it
is set. Unknown keys are refused too, because their meaning is not known.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from longctx.errors import UserError

HONOURED = frozenset({
    "peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules",
    "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save", "trainable_token_indices",
    "init_lora_weights", "lora_bias", "ensure_weight_tying",
})  # fmt: skip
# Settings of training, bookkeeping and initialisation. `bias` says which biases were saved, and the file shows that.
# PEFT itself sets fan_in_fan_out to false for every torch Linear.
NO_EFFECT = frozenset({
    "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "lora_dropout", "bias", "fan_in_fan_out", "loftq_config", "eva_config", "corda_config", "lora_ga_config",
    "qalora_group_size", "megatron_core", "runtime_config",
})  # fmt: skip
REFUSED: Mapping[str, str] = {
    "use_dora": "DoRA rescales the sum, it is not a sum",
    "use_qalora": "QA-LoRA pools the inputs of quantized layers",
    "layer_replication": "it repeats layers",
    "target_parameters": "it targets bare parameters, not modules",
    "alora_invocation_tokens": "it is active only after certain tokens",
    "monteclora_config": "it samples its factors",
    "velora_config": "VeLoRA needs a backward pass of its own",
    "use_bdlora": "its factors are block-diagonal",
    "arrow_config": "it routes between adapters",
    "kasa_config": "KaSA truncates the base's own weights",
    "megatron_config": "it was made for Megatron's parallel layers",
}
# PEFT's EMBEDDING_LAYER_NAMES, the only module names for which ensure_weight_tying has an effect.
TIED_LEAVES = ("embed_tokens", "lm_head")
_PLAIN_STARTS = ("gaussian", "eva", "orthogonal", "mica")
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


class PeftSettings:
    """The config of one adapter. `where` is the beginning of its error messages.

    Raises UserError for settings that adding to weights cannot express, for unknown keys and for values of a wrong
    type.
    """

    def __init__(self, config: Any, where: str) -> None:
        if not isinstance(config, dict):
            raise UserError(f"{where}: adapter_config.json is not a JSON object; fetch the adapter again")
        self._where = where
        self._refuse(config)
        self._rank, self._alpha = config.get("r", 8), config.get("lora_alpha", 8)
        self._rslora = bool(config.get("use_rslora"))
        self._rank_pattern: Mapping[str, Any] = config.get("rank_pattern") or {}
        self._alpha_pattern: Mapping[str, Any] = config.get("alpha_pattern") or {}
        self._target: str | list[str] = config["target_modules"]
        self._exclude: str | list[str] = config.get("exclude_modules") or []
        self._layers: Any = config.get("layers_to_transform")
        self._layers_pattern: Any = config.get("layers_pattern") or []
        self._saved: list[str] = list(config.get("modules_to_save") or [])
        self._tokens: Any = config.get("trainable_token_indices")
        self.ensure_weight_tying = bool(config.get("ensure_weight_tying"))
        self._check_values()

    def rank(self, module: str) -> int:
        return _by_pattern(self._rank_pattern, module, self._rank)

    def scale(self, module: str) -> float:
        """The scale of the module's factors: alpha / r, or alpha / sqrt(r) for rank-stabilized LoRA (2312.03732)."""
        rank, alpha = self.rank(module), _by_pattern(self._alpha_pattern, module, self._alpha)
        return alpha / math.sqrt(rank) if self._rslora else alpha / rank

    def targets(self, module: str, *, linear: bool) -> bool:
        """Whether PEFT gives the module factors; `linear`: it is a linear layer other than the output layer."""
        if _named(self._exclude, module):
            return False
        if any(re.match(rf"(^|.*\.){name}($|\..*)", module) for name in self._saved):
            return False
        if isinstance(self._target, str):
            if self._target.lower() == "all-linear":
                return linear
            return re.fullmatch(self._target, module) is not None
        if module in self._target:
            return True
        return any(module.endswith(f".{name}") for name in self._target) and self._chosen_layer(module)

    def saves(self, tensor: str) -> bool:
        """Whether modules_to_save covers the tensor; PEFT takes every module whose name ends with an entry."""
        parts = tensor.split(".")
        modules = [".".join(parts[:count]) for count in range(1, len(parts))]
        return any(module.endswith(name) for module in modules for name in self._saved)

    def token_rows(self, module: str, embedding: str | None) -> list[int] | None:
        """The rows of the module that the adapter replaces, or None; `embedding`: the model's input embedding."""
        if self._tokens is None:
            return None
        if isinstance(self._tokens, dict):
            return next((rows for name, rows in self._tokens.items() if module.endswith(name)), None)
        leaf = (embedding or "embed_tokens").rsplit(".", 1)[-1]
        return self._tokens if module.endswith(leaf) else None

    @property
    def ties_saved(self) -> bool:
        """Whether modules_to_save applies to embedding and output layer together in a tied model."""
        return self.ensure_weight_tying and any(name.rsplit(".", 1)[-1] in TIED_LEAVES for name in self._saved)

    @property
    def ties_factors(self) -> bool:
        """Whether factors apply to embedding and output layer together in a tied model."""
        if not self.ensure_weight_tying or self.ties_saved:
            return False
        if isinstance(self._target, str):
            return any(re.fullmatch(self._target, leaf) for leaf in TIED_LEAVES)
        return any(name.rsplit(".", 1)[-1] in TIED_LEAVES for name in self._target)

    def _chosen_layer(self, module: str) -> bool:
        if self._layers is None or self._layers == []:
            return True
        patterns = [self._layers_pattern] if isinstance(self._layers_pattern, str) else self._layers_pattern
        tries = [rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\." for pattern in patterns] or [r".*?\.[^.]*\.(?P<idx>\d+)\."]
        found = next((match for match in (re.match(item, module) for item in tries) if match), None)
        if found is None:
            return False
        layers = [self._layers] if isinstance(self._layers, int) else self._layers
        return int(found["idx"]) in layers

    def _refuse(self, config: Mapping[str, Any]) -> None:
        kind = config.get("peft_type", "LORA")
        if kind != "LORA":
            raise self._no_sum(f"its peft_type is {kind}, not LORA")
        for key, reason in REFUSED.items():
            if config.get(key):
                raise self._no_sum(f"{reason} ({key})")
        for key, value in config.items():
            if value and key not in HONOURED and key not in NO_EFFECT and key not in REFUSED:
                raise self._no_sum(
                    f"{key}={value!r} is no setting of LoRA that longctx knows; remove the key if it does not "
                    "change what the adapter computes"
                )
        start = config.get("init_lora_weights", True)
        if isinstance(start, str) and start.lower() not in _PLAIN_STARTS:
            changes = start.lower().startswith(_CHANGES_BASE)
            raise self._no_sum(
                f"its initialisation {start!r} changes the base's own weights; save it with peft's "
                "path_initial_model_for_weight_conversion"
                if changes
                else f"its initialisation {start!r} is unknown (init_lora_weights)"
            )
        if config.get("target_modules") is None:
            raise self._no_sum("target_modules is missing, so it is not said which modules it changes")

    def _check_values(self) -> None:
        ranks = [self._rank, *self._rank_pattern.values()]
        if not all(isinstance(rank, int) and rank > 0 for rank in ranks):
            raise self._no_sum(f"r and rank_pattern must be positive whole numbers, not {ranks}")
        alphas = [self._alpha, *self._alpha_pattern.values()]
        if not all(isinstance(alpha, int | float) for alpha in alphas):
            raise self._no_sum(f"lora_alpha and alpha_pattern must be numbers, not {alphas}")
        if isinstance(self._target, str) and (self._layers is not None or self._layers_pattern):
            raise self._no_sum("layers_to_transform and layers_pattern need target_modules as a list, as in peft")
        patterns = [*self._rank_pattern, *self._alpha_pattern, *self._saved]
        patterns += [text for text in (self._target, self._exclude) if isinstance(text, str)]
        patterns += [self._layers_pattern] if isinstance(self._layers_pattern, str) else self._layers_pattern
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise self._no_sum(f"{pattern!r} is not a regular expression ({error})") from None

    def _no_sum(self, reason: str) -> UserError:
        return UserError(f"{self._where} cannot be merged as a plain LoRA: {reason} (adapter_config.json)")


def _named(names: str | list[str], module: str) -> bool:
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return module in names or any(module.endswith(f".{name}") for name in names)


def _by_pattern(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """The value of the first pattern that matches, in the file's order, like PEFT's get_pattern_key."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return patterns.get(module, default)
