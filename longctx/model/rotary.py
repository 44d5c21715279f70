"""The rotary embedding of a model: rebuilt for each stage and checked against longctx.rope, with fp32 or fp64 angles.

transformers computes inv_freq and the angles in fp32, so at position 2^20 the angle of a fast dimension is off by up to
0.06. `ExactRotary` computes frequencies and angles in fp64 and rounds only cos and sin.

Shapes: B batch, S tokens, H heads, D head dim (all of it rotates).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from longctx.config.model import Precision
from longctx.model.fused import Operators, liger_rotate
from longctx.model.mixin import Mixin
from longctx.rope import attention_factor, check_fixed, inv_freq, rope_of

# transformers evaluates theta^(2i/d) in fp32, a few units in the last place from the exact value.
_TOLERANCE = 2e-6
# A theta rule keeps a yarn rope's factor and widens the window, and transformers warns of the two at every config that
# it reads. The frequencies are checked here, so the warning would tell users to correct what is right.
_YARN_FACTOR = "The explicitly set RoPE scaling factor"
logging.getLogger("transformers.modeling_rope_utils").addFilter(
    lambda record: not record.getMessage().startswith(_YARN_FACTOR)
)


def torch_power(base: float, exponents: np.ndarray) -> np.ndarray:
    """base^exponents, computed by torch; with it longctx.rope.inv_freq in float32 equals transformers bit for bit."""
    return torch.pow(base, torch.from_numpy(exponents)).numpy()


class ExactRotary(nn.Module):
    """Replaces transformers' rotary module: cos and sin [B, S, D] of positions [B, S], with angles in fp64."""

    inv_freq: Tensor

    def __init__(self, frequencies: np.ndarray, scaling: float) -> None:
        super().__init__()
        self.register_buffer("inv_freq", torch.from_numpy(frequencies.astype(np.float64)), persistent=False)
        self.attention_scaling = scaling

    def _apply(self, fn: Any, recurse: bool = True) -> ExactRotary:
        """Move the frequencies to the model's device, but do not round them when the model's dtype changes."""
        exact = self.inv_freq
        super()._apply(fn, recurse)
        self.inv_freq = exact.to(self.inv_freq.device)
        return self

    @torch.no_grad()
    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        angles = position_ids[..., None].double() * self.inv_freq
        both = torch.cat((angles, angles), dim=-1)
        cos, sin = both.cos() * self.attention_scaling, both.sin() * self.attention_scaling
        return cos.to(x.dtype), sin.to(x.dtype)


class KeptFrequencies(Mixin):
    """Mixed into transformers' rotary module, so that a cast of the model's dtype does not round its frequencies."""

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        own: Any = super()
        exact = dict(self._buffers)  # type: ignore[attr-defined]
        own._apply(fn, recurse)
        for name, moved in self._buffers.items():  # type: ignore[attr-defined]
            if moved is not None and moved.itemsize < exact[name].itemsize and not exact[name].is_meta:
                self._buffers[name] = exact[name].to(moved.device)  # type: ignore[attr-defined]
        return self


def keep_frequencies(base: Any) -> None:
    """Make the rotary module of a decoder keep its frequencies when the model's dtype changes."""
    if not isinstance(base.rotary_emb, ExactRotary):
        KeptFrequencies.into(base.rotary_emb)


def set_rope(model: nn.Module, rope: Mapping[str, Any], window: int, *, precision: Precision = "float32") -> None:
    """Give a Hugging Face model the rope `rope` (transformers' rope_parameters) and a window of `window` tokens.

    The model changes in place. The config's rope_parameters and max_position_embeddings are replaced, and the rotary
    module is rebuilt, because transformers reads them only in its constructor. The new inv_freq is checked against
    longctx.rope. Raises UserError for a rope that changes with the sequence's length (dynamic, or longrope with
    different short and long factors), because a training stage needs fixed frequencies.
    """
    from longctx.model.architectures import backbone_of, causal_lm_of

    base = backbone_of(model)
    config = causal_lm_of(model).config
    check_fixed(rope, "set_rope", "rope_for makes a fixed one")
    give_rope(config, {"rope_type": "default", **rope}, window)
    read = rope_of(config.to_dict(), "the model's config")
    exact = inv_freq(read.parameters, read.head_dim, window=window)
    device = base.rotary_emb.inv_freq.device
    if precision == "float64":
        scaling = attention_factor(read.parameters, window=window)
        base.rotary_emb = ExactRotary(exact, scaling).to(device)
    else:
        rotary: Any = _transformers_rotary(base)(config=config).to(device)
        # With equal factors nothing changes at run time, and comparing lengths would make the host wait for the device.
        rotary.rope_type = "default"
        base.rotary_emb = rotary
        if isinstance(base.layers[0], Mixin):  # a prepared model, whatever rotary module it had
            keep_frequencies(base)
    check_inv_freq(cast(Tensor, base.rotary_emb.inv_freq), exact, f"rope {dict(config.rope_parameters)}")


def give_rope(config: Any, rope: Mapping[str, Any], window: int) -> None:
    """Set a transformers configuration's rope_parameters and max_position_embeddings, in place.

    The object may also have a top-level original_max_position_embeddings from its file. transformers prefers that one,
    so it is set too.
    """
    config.rope_parameters = dict(rope)
    config.max_position_embeddings = int(window)
    if hasattr(config, "original_max_position_embeddings"):
        original = rope.get("original_max_position_embeddings", int(window))
        config.original_max_position_embeddings = original


def check_inv_freq(found: Tensor, exact: np.ndarray, what: str) -> None:
    """Raise RuntimeError unless a rotary module's inv_freq [D/2] equals `exact` up to fp32 rounding."""
    ours = torch.from_numpy(np.asarray(exact, dtype=np.float64))
    theirs = found.detach().double().cpu()
    if theirs.shape != ours.shape:
        raise RuntimeError(f"{what}: inv_freq has shape {tuple(theirs.shape)}, expected {tuple(ours.shape)}")
    worst = ((theirs - ours).abs() / ours.abs().clamp_min(1e-300)).max().item()
    if not worst < _TOLERANCE:
        raise RuntimeError(f"{what}: inv_freq is off by {worst:.2e} relative; the rotary module was not rebuilt")


def _transformers_rotary(base: nn.Module) -> type[nn.Module]:
    """The rotary class that transformers has for this architecture, even if ExactRotary has replaced its module."""
    import sys

    name = type(base).__name__.removesuffix("Model") + "RotaryEmbedding"
    return getattr(sys.modules[type(base).__module__], name)


class Rotate(torch.autograd.Function):
    """Rotates x [B, S, H, D] by cos and sin [B, S, D] -> [B, H, S, D] (Su et al. 2104.09864, eq. 34).

    It computes the same products and sums as transformers' q * cos + rotate_half(q) * sin, without the temporaries. The
    backward pass rotates by the opposite angle and needs only cos and sin. The result keeps x's order in memory, which
    is the attention kernels' order too, so nothing is copied before or after attention.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(x.transpose(1, 2), cos.unsqueeze(1), sin.unsqueeze(1))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return _turn(grads[0].transpose(1, 2), cos.unsqueeze(2), -sin.unsqueeze(2)), None, None


def rotate(operators: Operators, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate q and k [B, S, H, D] by cos and sin [B, S, D] -> [B, H, S, D]; liger-kernel does it in place."""
    cos, sin = cos.to(q.dtype), sin.to(q.dtype)  # under torch.autocast they have the residual stream's dtype
    if operators == "liger":
        return liger_rotate(q, k, cos, sin)
    return Rotate.apply(q, cos, sin), Rotate.apply(k, cos, sin)


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    out = torch.mul(x, cos, out=torch.empty_like(x))
    out[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
    out[..., half:].addcmul_(x[..., :half], sin[..., half:])
    return out
