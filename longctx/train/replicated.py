"""engine=ddp: every rank holds all weights; gradients are in one flat buffer, which is reduced once per step.

For small models this is faster than bucketed DDP (one collective, no hooks). Unlike DDP it adds in the same order
before and after a restart, so that a resumed run is bit-identical on any number of ranks. One process needs no
wrapper and no collective. bfloat16 weights get fp32 masters and fp32 gradient accumulation.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn

from longctx.train.fragments import Fragment, FragmentReader, Kind
from longctx.train.parameters import decay_groups, trainable

if TYPE_CHECKING:
    from longctx.config.train import OptimConfig
    from longctx.distributed.ranks import Ranks
    from longctx.model import LossModel, LossOutput

MOMENTS: tuple[Kind, Kind] = ("exp_avg", "exp_avg_sq")
_PIECE = 1 << 26


class ReplicatedEngine:
    """The engine that keeps all weights on every rank; see longctx.train.engine.Engine for its methods."""

    def __init__(self, optim: OptimConfig, model: LossModel, ranks: Ranks) -> None:
        self.model, self.ranks, self.clip = model.to(ranks.device), ranks, optim.max_grad_norm
        self._named = trainable(model)
        wide = torch.float64 if self._named[0][1].dtype == torch.float64 else torch.float32
        self._masters = [p if p.dtype == wide else nn.Parameter(p.detach().to(wide)) for _, p in self._named]
        self._grad = torch.zeros(sum(p.numel() for p in self._masters), dtype=wide, device=ranks.device)
        offset = 0
        for (_, parameter), master in zip(self._named, self._masters, strict=True):
            view = self._grad[offset : offset + master.numel()].view_as(master)
            master.grad = view
            if parameter is not master:
                parameter.register_post_accumulate_grad_hook(_widen_into(view))
            offset += master.numel()
        names = [name for name, _ in self._named]
        groups = decay_groups(list(zip(names, self._masters, strict=True)), optim.weight_decay)
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(optim.beta1, optim.beta2), eps=optim.eps, fused=True)
        self.facts: dict[str, Any] = {
            "ddp": "replicated weights", "world": ranks.world, "ZeRO": 0, "device": str(ranks.device),
            "backend": str(dist.get_backend()) if dist.is_initialized() else "none",
            "weights": str(self._named[0][1].dtype).removeprefix("torch."),
            "masters": str(wide).removeprefix("torch."), "gradients": str(wide).removeprefix("torch."),
            "trainable": self._grad.numel(),
        }  # fmt: skip

    def forward(self, **batch: Any) -> LossOutput:
        return self.model(**batch)

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        loss.backward()
        if last and self.ranks.world > 1:
            dist.all_reduce(self._grad)
            self._grad.mul_(1.0 / self.ranks.world)

    def grad_norm(self) -> torch.Tensor:
        """On a GPU piece by piece, because torch forms the norm in fp64 from a copy in fp64."""
        if self._grad.device.type == "cpu":
            return torch.linalg.vector_norm(self._grad, dtype=torch.float64)
        norms = [torch.linalg.vector_norm(piece, dtype=torch.float64) for piece in self._grad.split(_PIECE)]
        return torch.linalg.vector_norm(torch.stack(norms))

    def step(self, lr: float, norm: float) -> None:
        if self.clip > 0 and norm > self.clip:
            self._grad.mul_(self.clip / (norm + 1e-6))
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        for (_, parameter), master in zip(self._named, self._masters, strict=True):
            if parameter is not master:
                parameter.data.copy_(master.data)
        self.discard()

    def discard(self) -> None:
        self._grad.zero_()

    def shapes(self) -> dict[str, list[int]]:
        return {name: list(parameter.shape) for name, parameter in self._named}

    def fragments(self) -> Iterator[Fragment]:
        for position, ((name, _), master) in enumerate(zip(self._named, self._masters, strict=True)):
            if position % self.ranks.world != self.ranks.rank:
                continue
            yield Fragment("weight", name, 0, master.detach().flatten())
            state = self.optimizer.state[master]
            for kind in MOMENTS:
                if kind in state:
                    yield Fragment(kind, name, 0, state[kind].flatten())
            steps = float(state["step"]) if "step" in state else 0.0
            yield Fragment("steps", name, 0, torch.tensor([steps], dtype=torch.float64))

    def restore(self, reader: FragmentReader) -> None:
        for (name, parameter), master in zip(self._named, self._masters, strict=True):
            master.data.copy_(reader.read("weight", name, 0, master.numel()).view_as(master))
            if parameter is not master:
                parameter.data.copy_(master.data)
            steps = float(reader.read("steps", name, 0, 1))
            if steps:
                state: dict[str, Any] = {"step": torch.tensor(steps, dtype=torch.float32, device=master.device)}
                for kind in MOMENTS:
                    flat = reader.read(kind, name, 0, master.numel()).to(master)
                    state[kind] = flat.view_as(master).clone()
                self.optimizer.state[master] = state
        self.discard()

    def state_for_export(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, parameter in self.model.named_parameters():
            yield name, parameter.detach()

    def close(self) -> None:
        self.optimizer.state.clear()


def _widen_into(view: torch.Tensor) -> Any:
    """A hook that adds a parameter's gradient to its wide accumulator and frees it."""

    def hook(parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        view.add_(parameter.grad)
        parameter.grad = None

    return hook
