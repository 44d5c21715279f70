"""engine=ddp: every rank holds all weights; gradients are in one flat buffer, which is reduced once per step.

For small models this is faster than bucketed DDP (one collective, no hooks). Unlike DDP it adds in the same order
before and after a restart, so that a resumed run is bit-identical on any number of ranks. One process needs no
wrapper and no collective. bfloat16 weights get fp32 masters and an fp32 accumulator, `main_grad`, to which products add
(longctx.model.products) and a hook adds what autograd has made. Masters and moments may lie in host memory, all or a
share of them (longctx.train.offloaded); the results do not change.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import nn

from longctx.model.host import HostMemory
from longctx.train.fragments import MOMENTS, Fragment, FragmentReader
from longctx.train.offloaded import Offloaded, OffloadedAdamW, on_host
from longctx.train.parameters import decay_groups, decays, trainable

if TYPE_CHECKING:
    from longctx.config.train import EngineConfig, OptimConfig
    from longctx.distributed.ranks import Ranks
    from longctx.model import LossModel, LossOutput

_PIECE = 1 << 26


class ReplicatedEngine:
    """The engine that keeps all weights on every rank; see longctx.train.engine.Engine for its methods."""

    def __init__(self, config: EngineConfig, optim: OptimConfig, model: LossModel, ranks: Ranks) -> None:
        self.model, self.ranks, self.clip = model.to(ranks.device), ranks, optim.max_grad_norm
        self._named = trainable(model)
        wide = torch.float64 if self._named[0][1].dtype == torch.float64 else torch.float32
        sizes = [parameter.numel() for _, parameter in self._named]
        self._away = on_host(sizes, config.offload_ratio if config.offload_optimizer else 0.0)
        self._memory = HostMemory(ranks.device)
        self._hooks: list[Any] = []
        self._masters = [self._master(p, wide, away) for (_, p), away in zip(self._named, self._away, strict=True)]
        self._grad = torch.zeros(sum(sizes), dtype=wide, device=ranks.device)
        self._make_optimizers(optim, self._grad.split(sizes))
        self.facts: dict[str, Any] = {
            "ddp": "replicated weights", "world": ranks.world, "ZeRO": 0, "device": str(ranks.device),
            "backend": str(dist.get_backend()) if dist.is_initialized() else "none",
            "weights": str(self._named[0][1].dtype).removeprefix("torch."),
            "masters": str(wide).removeprefix("torch."), "gradients": str(wide).removeprefix("torch."),
            "trainable": self._grad.numel(),
        }  # fmt: skip
        if config.offload_optimizer:
            count = sum(size for size, away in zip(sizes, self._away, strict=True) if away)
            self.facts["offloaded"] = f"optimizer states of {count:,} weights"

    def _master(self, parameter: nn.Parameter, wide: torch.dtype, away: bool) -> torch.Tensor:
        """The parameter itself if it is wide, or else its wide copy, on the host if its states are."""
        if parameter.dtype == wide:
            return parameter
        if not away:
            return nn.Parameter(parameter.detach().to(wide))
        return self._memory.zeros(parameter.numel(), wide).view_as(parameter).copy_(parameter.detach())

    def _make_optimizers(self, optim: OptimConfig, gradients: Sequence[torch.Tensor]) -> None:
        """Give every parameter its part of the flat gradient and its place in one of two optimizers."""
        here: list[tuple[str, nn.Parameter]] = []
        away: list[Offloaded] = []
        for (name, parameter), master, off, flat in zip(self._named, self._masters, self._away, gradients, strict=True):
            view = flat.view_as(parameter)
            if parameter is master:
                parameter.grad = view
            else:
                parameter.main_grad = view  # type: ignore[attr-defined]
                self._hooks.append(parameter.register_post_accumulate_grad_hook(_widen_into(view)))
            if off:
                away.append(Offloaded(parameter, master, flat, optim.weight_decay if decays(parameter) else 0.0))
            else:
                master.grad = view
                here.append((name, cast(nn.Parameter, master)))
        betas = (optim.beta1, optim.beta2)
        groups = decay_groups(here, optim.weight_decay)
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=optim.eps, fused=True) if here else None
        self.offloaded = OffloadedAdamW(away, self._memory, betas, optim.eps)

    def _state(self, position: int) -> dict[str, torch.Tensor]:
        """The optimizer's state of a parameter; it has no `step` before the first one."""
        optimizer: Any = self.offloaded if self._away[position] else self.optimizer
        return optimizer.state[self._masters[position]]

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
        if self.optimizer is not None:
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
        for (_, parameter), master, away in zip(self._named, self._masters, self._away, strict=True):
            if parameter is not master and not away:
                parameter.data.copy_(master.data)
        self.offloaded.step(lr)
        self.discard()

    def discard(self) -> None:
        self._grad.zero_()

    def shapes(self) -> dict[str, list[int]]:
        return {name: list(parameter.shape) for name, parameter in self._named}

    def fragments(self) -> Iterator[Fragment]:
        if self.ranks.device.type == "cuda":  # states may still be on their way to the host
            torch.cuda.current_stream(self.ranks.device).synchronize()
        for position, ((name, _), master) in enumerate(zip(self._named, self._masters, strict=True)):
            if position % self.ranks.world != self.ranks.rank:
                continue
            yield Fragment("weight", name, 0, master.detach().flatten())
            state = self._state(position)
            for kind in MOMENTS if "step" in state else ():
                yield Fragment(kind, name, 0, state[kind].flatten())
            steps = float(state["step"]) if "step" in state else 0.0
            yield Fragment("steps", name, 0, torch.tensor([steps], dtype=torch.float64))

    def restore(self, reader: FragmentReader) -> None:
        for position, ((name, parameter), master) in enumerate(zip(self._named, self._masters, strict=True)):
            master.data.copy_(reader.read("weight", name, 0, master.numel()).view_as(master))
            if parameter is not master:
                parameter.data.copy_(master.data)
            steps = float(reader.read("steps", name, 0, 1))
            if steps:
                state = self._state(position)
                for kind in MOMENTS:
                    if kind not in state:
                        state[kind] = torch.zeros_like(master.data)
                    state[kind].copy_(reader.read(kind, name, 0, master.numel()).view_as(state[kind]))
                where = "cpu" if self._away[position] else master.device
                state["step"] = torch.tensor(steps, dtype=torch.float32, device=where)
        self.discard()

    def state_for_export(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, parameter in self.model.named_parameters():
            yield name, parameter.detach()

    def close(self) -> None:
        if self.optimizer is not None:
            self.optimizer.state.clear()
        self.offloaded.state.clear()
        for hook in self._hooks:
            hook.remove()
        for _, parameter in self._named:
            vars(parameter).pop("main_grad", None)


def _widen_into(view: torch.Tensor) -> Any:
    """A hook that adds the gradient that autograd has made, if any, to a parameter's wide accumulator and frees it."""

    def hook(parameter: torch.Tensor) -> None:
        if parameter.grad is not None:
            view.add_(parameter.grad)
            parameter.grad = None

    return hook
