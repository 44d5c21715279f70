"""AdamW whose states lie in host memory and come to the device a piece at a time.

ZeRO-Offload (Ren et al. 2101.06840) sends gradients to the host and updates weights there. Here the states travel
instead, 24 bytes a weight rather than 6. In return a weight is updated as on the device, bit for bit, no CPU optimizer
has to be compiled, and gradients take no host memory. Over PCIe 5 four billion weights take about two seconds.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from longctx.model.host import HostMemory

# Elements of a piece, enough for the link's full rate. It is a multiple of the cache lines by which torch's CPU kernel
# splits a tensor, so that a piece is rounded as it would be inside the whole.
PIECE = 1 << 24


def on_host(sizes: Sequence[int], ratio: float) -> list[bool]:
    """Choose the parameters whose states go to the host: the largest first, as long as their share is at most `ratio`.

    sizes: elements of each parameter.
    """
    left, chosen = ratio * sum(sizes), [False] * len(sizes)
    for position in sorted(range(len(sizes)), key=lambda position: -sizes[position]):
        if sizes[position] <= left:
            chosen[position], left = True, left - sizes[position]
    return chosen


@dataclass(frozen=True)
class Offloaded:
    """A parameter whose states are on the host.

    master: its wide copy, flat, on the host; the parameter itself if that is wide. gradient: flat, on the device.
    """

    parameter: Tensor
    master: Tensor
    gradient: Tensor
    weight_decay: float


class OffloadedAdamW:
    """torch.optim.AdamW(fused=True) for parameters whose states are on the host.

    state: exp_avg, exp_avg_sq (flat) and, after the first step, `step`, by master, as torch's optimizers have it.
    """

    def __init__(
        self, items: Sequence[Offloaded], memory: HostMemory, betas: tuple[float, float], eps: float, piece: int = PIECE
    ) -> None:
        self.items, self.betas, self.eps, self.piece = items, betas, eps, piece
        self.state: defaultdict[Tensor, dict[str, Tensor]] = defaultdict(dict)
        for item in items:
            for kind in ("exp_avg", "exp_avg_sq"):
                self.state[item.master][kind] = memory.zeros(item.gradient.numel(), item.gradient.dtype)

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Update every weight. On a GPU the states are back on the host once its current stream has come to here."""
        largest = min(self.piece, max((item.gradient.numel() for item in self.items), default=0))
        scratch = [item.gradient.new_empty(largest) for item in self.items[:1] for _ in range(3)]
        for item in self.items:
            self._update(item, lr, scratch)

    def _update(self, item: Offloaded, lr: float, scratch: list[Tensor]) -> None:
        """Take each piece of master and moments to the device, update it there, and bring it home."""
        state, weights = self.state[item.master], item.parameter.data.view(-1)
        done = float(state.setdefault("step", torch.zeros(())))
        home = [item.master.data.view(-1), state["exp_avg"], state["exp_avg_sq"]]
        for start in range(0, len(weights), self.piece):
            part = slice(start, start + self.piece)
            pieces = [flat[part] for flat in home]
            near = [room[: len(piece)] for room, piece in zip(scratch, pieces, strict=True)]
            if item.master is item.parameter:
                near[0] = pieces[0]
            for moved, piece in zip(near, pieces, strict=True):
                moved.copy_(piece, non_blocking=True)
            steps = torch.full((), done, dtype=torch.float32, device=weights.device)  # adamw adds one
            adamw(
                [near[0]], [item.gradient[part]], [near[1]], [near[2]], [], [steps], fused=True, amsgrad=False,
                beta1=self.betas[0], beta2=self.betas[1], lr=lr, weight_decay=item.weight_decay, eps=self.eps,
                maximize=False,
            )  # fmt: skip
            weights[part].copy_(near[0])
            for moved, piece in zip(near, pieces, strict=True):
                piece.copy_(moved, non_blocking=True)
        state["step"] += 1
