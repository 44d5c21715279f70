"""Estimates the memory and the time of an evaluation: of a run's evidence, which one process measures on one device
after training, and of `longctx eval`.

Every model is read by plain transformers without a cache (longctx.eval): whole sequences of needles, and of held-out
text, whose logits are formed in pieces. On a CPU it is float32, and each core reads a haystack of its own.
Shape letters: e hidden, q and k the widths of all query and all KV heads, f feed-forward, D head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from longctx.config.after_training import EvidenceSettings
from longctx.config.eval import NeedleConfig
from longctx.config.train import TrainConfig
from longctx.dtype import BYTES
from longctx.errors import UserError
from longctx.planner.remedies import GIB, USABLE
from longctx.shape import Shape

PIECE = 2048  # tokens whose logits are formed at once, longctx.eval.loss.token_losses
KEYS = ("needle.lengths", "heldout_lengths")


@dataclass(frozen=True)
class EvidenceNeed:
    """One reading of an evaluation: the key that asks for it, its length in tokens, and bytes.

    at_once: sequences of this length that are read at the same time. weights: of one model. forward: of all of them.
    """

    key: str
    tokens: int
    at_once: int
    weights: float
    forward: float

    @property
    def total(self) -> float:
        return self.weights + self.forward


def forward_bytes(shape: Shape, tokens: int, b: int, *, losses: bool = False) -> float:
    """Bytes that one sequence needs beside the weights of b bytes each; losses: those of its tokens are formed too.

    In the feed-forward network three wide tensors are alive and four hidden ones: embeddings, the layer's input, its
    residual and the norm's output. In attention it is the rotation of the queries.
    """
    e, q, k, f = shape.hidden, shape.query, shape.kv, shape.ffn
    layer = tokens * b * (max(3 * f + 4 * e, 4 * q + 2 * k + 3 * e) + 2 * shape.head_dim)
    wide = max(4, b)
    logits = min(PIECE, tokens) * shape.vocab * ((b if b < wide else 0) + 2 * wide)  # as given, wide, and log-softmax
    return float(max(layer, tokens * e * b + logits if losses else 0))


def needs_of(asked: EvidenceSettings, shape: Shape, dtype: str, device: str, cores: int) -> list[EvidenceNeed]:
    """What each length of a run's evidence needs. dtype: the weights', on a GPU. cores: of the machine, on a CPU."""
    return readings(asked.needle, asked.heldout_lengths, KEYS, shape, dtype, device, cores)


def readings(
    needle: NeedleConfig, losses: Sequence[int], keys: tuple[str, str], shape: Shape, dtype: str, device: str,
    cores: int,
) -> list[EvidenceNeed]:  # fmt: skip
    """What each length of the needles and of the held-out text (`losses`) needs; keys: those of the two lengths.

    dtype: the weights', on a GPU. cores: those that read at once, where device is cpu.
    """
    b = 4 if device == "cpu" else BYTES[dtype]
    haystacks = _haystacks(needle)
    at_once = min(cores, haystacks) if device == "cpu" else 1
    weights = float(b * shape.parameters)
    needles = [
        EvidenceNeed(keys[0], length, at_once, weights, at_once * forward_bytes(shape, length, b))
        for length in needle.lengths
    ]
    return needles + [
        EvidenceNeed(keys[1], length, 1, weights, forward_bytes(shape, length, b, losses=True)) for length in losses
    ]


def flop_of(config: TrainConfig, asked: EvidenceSettings, shape: Shape, stages: int) -> float:
    """Floating point operations of all models that the evidence reads; stages: those of the curriculum."""
    further = 2 * (config.after_training.sibling is not None) + asked.theta_only + (asked.control is not None)
    models = 2 + further  # the base and the extended model
    haystacks = _haystacks(asked.needle)
    needles = sum(haystacks * _forward_flop(shape, length, answers_only=True) for length in asked.needle.lengths)
    losses = sum(asked.heldout_sequences * _forward_flop(shape, length) for length in asked.heldout_lengths)
    return (models + (asked.unseen is not None)) * needles + (models + stages - 1) * losses


def _haystacks(needle: NeedleConfig) -> int:
    """The prompts of one length of a needle grid."""
    return len(needle.seeds) * needle.per_cell * (len(needle.depths) if needle.single else 1)


def _forward_flop(shape: Shape, tokens: int, *, answers_only: bool = False) -> float:
    """Operations of one forward pass. answers_only: no logits and no last layer's attention but at the answers."""
    weights, layers = shape.matmul_weights, shape.layers
    if answers_only:
        weights, layers = shape.layers * shape.layer_weights, shape.layers - 1
    return 2.0 * weights * tokens + 4.0 * layers * shape.query * tokens * tokens / 2


def fits(need: EvidenceNeed, device_bytes: float) -> bool:
    """Tell whether a GPU, or the whole machine where the CPU reads, has the memory."""
    return need.total <= USABLE * device_bytes


def largest(needs: list[EvidenceNeed]) -> EvidenceNeed:
    return max(needs, key=lambda need: need.total)


def check_evidence_memory(needs: list[EvidenceNeed], device_bytes: float, device: str) -> None:
    """Raise UserError where a length does not fit the device that measures the evidence, with lengths that do.

    device_bytes: memory of a GPU, or of the whole machine where device is cpu.
    """
    most = largest(needs)
    if fits(most, device_bytes):
        return
    where = "the one GPU that measures it" if device == "cuda" else "this machine"
    together = f", {most.at_once} at once" if most.at_once > 1 else ""
    shorter = fitting_words(needs, device_bytes, "after_training.evidence.")
    raise UserError(
        f"after_training.evidence.{most.key} asks for {most.tokens:,} tokens{together}, which need about "
        f"{most.total / GIB:.3g} GiB on {where} (weights {most.weights / GIB:.3g}, the forward pass "
        f"{most.forward / GIB:.3g}), and {USABLE * device_bytes / GIB:.3g} GiB can be used there: training would end "
        f"without evidence. What would fit: {shorter + '; or ' if shorter else ''}after_training.evidence=null, and "
        "`longctx eval` of the finished models on a larger device. accept=[memory] starts it all the same "
        "(configs/after_training, docs/eval.md)"
    )


def fitting_words(needs: list[EvidenceNeed], device_bytes: float, section: str = "") -> str:
    """The lengths that fit instead of those that do not, as words for the command line.

    section: what comes before the keys, with its dot. Empty where no length of a key fits.
    """
    words = []
    for key in dict.fromkeys(need.key for need in needs):
        asked = [need for need in needs if need.key == key]
        fitting = [need.tokens for need in asked if fits(need, device_bytes)]
        if not fitting:
            return ""
        if len(fitting) < len(asked):
            words.append(f"'{section}{key}=[{','.join(map(str, fitting))}]'")
    return " ".join(words)
