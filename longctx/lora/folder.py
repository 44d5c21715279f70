"""Writes an adapter's files other than the factors: PEFT's config, longctx.json and the model card.

The content does not depend on the time or on the output's name, so the same seed gives the same bytes.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import longctx
from longctx.lora.adapter import EXTENSION_FILE
from longctx.lora.modules import WeightKind, leaf_of
from longctx.rope.config import describe_rope
from longctx.storage.files import write_json

if TYPE_CHECKING:
    from longctx.config.lora import ExtractConfig


@dataclass(frozen=True)
class TensorRecord:
    """The record of one tensor in longctx.json and the model card.

    norm: of the difference. share: the share of its squared norm that the written factors keep. residual: the norm of
    what they leave, divided by `norm`. carried: factors, exact or no.
    """

    tensor: str
    kind: str
    shape: list[int]
    rank: int
    norm: float
    share: float
    residual: float
    method: str
    converged: bool
    carried: str
    base_sha256: str


@dataclass(frozen=True)
class Extension:
    """The rope and window before and after the training; longctx.json records them and lora merge writes them."""

    rope_parameters: dict[str, Any]
    window: int | None
    base_rope_parameters: dict[str, Any]
    base_window: int | None

    @property
    def changed(self) -> bool:
        return (self.rope_parameters, self.window) != (self.base_rope_parameters, self.base_window)


# For people, where the adapter has factors for an embedding that is the output layer too (ensure_weight_tying).
ONE_WEIGHT = (
    "embedding and output layer are one weight: to load this adapter take peft 0.21 and transformers 5.17 or later, "
    "since older ones compute something else, without a warning; `longctx lora merge` needs no peft"
)


def adapter_config(rows: Sequence[TensorRecord], base: str, *, rslora: bool, tied_head: str | None) -> dict[str, Any]:
    """The content of PEFT's adapter_config.json; alpha equals the rank of each module.

    tied_head: the output layer that shares the embedding's factors; PEFT is told to keep the two tied.
    """
    carried = [row for row in rows if row.carried == "factors"]
    rank = max(row.rank for row in carried)
    module = {row.tensor.removesuffix(".weight"): row.rank for row in carried}
    embedding = next((row for row in carried if row.kind == WeightKind.EMBEDDING.value), None)
    tied = embedding is not None and tied_head is not None
    if embedding is not None and tied_head is not None:
        module[tied_head.removesuffix(".weight")] = embedding.rank
    different = {name: r for name, r in module.items() if r != rank}
    return {
        "base_model_name_or_path": base,
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": different,
        "alpha_pattern": different,
        "target_modules": sorted({leaf_of(name) for name in module}),
        "ensure_weight_tying": tied,
        "use_rslora": rslora,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "modules_to_save": None,
        "inference_mode": True,
    }


def totals(rows: Sequence[TensorRecord]) -> dict[str, float]:
    """The kept share of the squared norm: of the matrices with factors, and of all tensors that changed."""

    def share(chosen: Sequence[TensorRecord]) -> float:
        total = sum(row.norm**2 for row in chosen)
        return sum(row.share * row.norm**2 for row in chosen) / total if total else 1.0

    return {"factors": share([row for row in rows if row.carried == "factors"]), "everything": share(rows)}


def write_extension_file(folder: Path, rows: Sequence[TensorRecord], extension: Extension, layout: Mapping[str, Any],
                    config: ExtractConfig) -> None:  # fmt: skip
    document = {
        "format": 1,
        "longctx_version": longctx.__version__,
        "base": config.base,
        "tuned": config.tuned,
        "direction": "tuned - base",
        "profile": config.profile,
        "seed": config.seed,
        **asdict(extension),
        "extends": extension.changed,
        "layout": dict(layout),
        "share": totals(rows),
        "tensors": {row.tensor: {k: v for k, v in asdict(row).items() if k != "tensor"} for row in rows},
    }
    write_json(folder / EXTENSION_FILE, document)


def write_card(
    folder: Path, rows: Sequence[TensorRecord], extension: Extension, config: ExtractConfig, *, one_weight: bool
) -> None:
    """Write the adapter's README.md. one_weight: its embedding is the output layer too."""
    carried = [row for row in rows if row.carried == "factors"]
    exact = [row for row in rows if row.carried == "exact"]
    lost = [row for row in rows if row.carried == "no" and row.norm > 0]
    share = totals(rows)
    lines = [
        "---",
        "library_name: peft",
        f"base_model: {config.base}",
        "tags: [lora, long-context, longctx]",
        "---",
        "",
        f"# The difference {config.tuned} - {config.base}, as a LoRA",
        "",
        f"Rank {max(row.rank for row in carried)}, {len(carried)} modules, profile `{config.profile}`. It keeps "
        f"{share['factors']:.2%} of the squared norm of the matrices it carries.",
        "",
    ]
    if extension.changed:
        lines += [
            f"The tuned model reads {extension.window:,} tokens ({describe_rope(extension.rope_parameters)}); the "
            f"base read {extension.base_window:,} ({describe_rope(extension.base_rope_parameters)}). **The weights "
            "alone do not carry that**: a merged model's config.json must say so too, and `longctx lora merge` "
            "writes it.",
            "",
        ]
    lines += [
        "Made with:",
        "",
        "```",
        command(config),
        "```",
        "",
        "Carry it into a fine-tune of the same base:",
        "",
    ]
    lines += ["```", "longctx lora merge target=FINE_TUNE adapter=THIS_FOLDER out=MERGED", "```", ""]
    if one_weight:
        lines += [f"{ONE_WEIGHT[0].upper()}{ONE_WEIGHT[1:]}.", ""]
    if exact:
        lines += [
            f"{len(exact)} norms and biases are carried exactly, as differences, in `norm_deltas.safetensors`: "
            "longctx adds them, peft and vLLM do not read them.",
            "",
        ]
    if lost:
        names = ", ".join(f"`{row.tensor}`" for row in lost[:40])
        more = f" and {len(lost) - 40} more" if len(lost) > 40 else ""
        lines += [f"Changed by the training and **not carried**: {names}{more}.", ""]
    lines += [
        "| tensor | shape | rank | norm of the difference | share kept | relative residual |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row.tensor} | {' x '.join(map(str, row.shape))} | {row.rank} | {row.norm:.4g} | {row.share:.4f} | "
        f"{row.residual:.4f} |"
        for row in carried
    ]
    (folder / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def command(config: ExtractConfig) -> str:
    """The command that makes this adapter again, without settings that have their defaults."""
    default = type(config)(base="BASE", tuned="TUNED", out="ADAPTER")
    words = [
        "longctx",
        "lora",
        "extract",
        f"base={config.base}",
        f"tuned={config.tuned}",
        "out=ADAPTER",
        f"rank={config.rank}",
    ]
    for key, value in asdict(config).items():  # type: ignore[call-overload]
        if key not in ("base", "tuned", "out", "rank", "format") and value != getattr(default, key):
            words.append(f"{key}={str(value).lower() if isinstance(value, bool) else value}")
    return " ".join(shlex.quote(word) for word in words)


def carried_as(kind: WeightKind, *, profile: str, head: bool, embeddings: bool) -> str:
    """How the adapter carries a changed tensor: `factors`, `exact` (in norm_deltas.safetensors) or `no`."""
    if kind is WeightKind.LINEAR or (kind is WeightKind.HEAD and head) or (kind is WeightKind.EMBEDDING and embeddings):
        return "factors"
    return "exact" if kind is WeightKind.VECTOR and profile == "full" else "no"
