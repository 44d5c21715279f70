"""The layout of one sequence on one rank: which tokens the rank holds, and how it shards and gathers tensors.

Sharding is an index_select, so it is differentiable. Un-sharding gathers the tokens of every rank and drops the
padding. Its backward takes this rank's slice, because each rank is expected to compute the same loss of the whole
sequence.

Shapes: S tokens of the sequence, n tokens of this rank (padding included).
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from longctx.attention.group import AttentionGroup
from longctx.attention.rank_attention import LayoutCache
from longctx.layout import SequenceLayout


class Layout:
    """This rank's tokens of one sequence. `arithmetic` holds the layout of all ranks.

    `ContextParallel.layout` makes it. `shard` and `unshard` cut and gather any dimension of a tensor, `indices`,
    `positions` and `valid` describe the local tokens [n].

    >>> import longctx, torch
    >>> layout = longctx.ContextParallel.from_world().layout(seq_len=6, documents=[0, 4, 6], positions="document")
    >>> layout.indices.tolist(), layout.positions.tolist()
    ([0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 0, 1])
    >>> x = torch.randn(2, 6, 8)
    >>> torch.equal(layout.unshard(layout.shard(x, dim=1), dim=1), x)
    True
    """

    def __init__(
        self, cache: LayoutCache, arithmetic: SequenceLayout, restart: bool, batch: Tensor | None = None
    ) -> None:
        self.cache, self.arithmetic, self.restart, self.batch = cache, arithmetic, restart, batch
        cache.prepare(arithmetic.boundaries, arithmetic)
        self.boundaries = _tensor(arithmetic.boundaries)
        self.compared = False  # whether transformers' positions have been compared with this layout's

    def __reduce__(self) -> Any:
        """Pickle what `ContextParallel.layout` makes it from, because its cache belongs to a process."""
        kind, restart = self.cache.kind, "document" if self.restart else "sequence"
        return _made_again, (self.batch, self.cp, self.seq_len, self.arithmetic.boundaries, kind, restart)

    def of_batch(self, input_ids: Tensor) -> Layout:
        """This layout with a checksum of the whole sequences that it cuts, which `check_batch` compares over ranks.

        It stays on the batch's device: the host would wait for a GPU.
        """
        if self.cp.size == 1 or len(self.cp.agreed) == 2:
            return self
        places = torch.arange(1, input_ids.numel() + 1, device=input_ids.device)
        return Layout(self.cache, self.arithmetic, self.restart, (input_ids.flatten() * places).sum())

    def check_batch(self, device: torch.device, *, training: bool) -> None:
        """Raise ValueError unless all ranks cut the same sequences.

        The group's first batch in training and its first in evaluation are compared: their loaders are two.
        """
        if self.batch is None or training in self.cp.agreed:
            return
        sums = self.cp.transport.all_gather(self.batch.to(device)[None])
        if len({int(total) for total in sums}) > 1:
            raise ValueError(
                f"the {self.cp.size} ranks of this ContextParallel share every sequence, and they were given different "
                "batches: give all of them the same ones. accelerate and Trainer deal a loader's batches out among "
                "the ranks: keep the loader out of accelerator.prepare, and let a Trainer's get_train_dataloader "
                "and get_eval_dataloader return a plain DataLoader (docs/api.md, prepare)"
            )
        self.cp.agreed.add(training)

    @property
    def cp(self) -> AttentionGroup:
        return self.cache.cp

    @property
    def handle(self) -> int:
        return self.cache.handle

    @property
    def seq_len(self) -> int:
        """S, without padding."""
        return self.arithmetic.seq_len

    @property
    def padded_len(self) -> int:
        return self.arithmetic.padded_len

    @property
    def local_len(self) -> int:
        """n, padding included; the same on every rank."""
        return self.arithmetic.rank_len

    @cached_property
    def indices(self) -> Tensor:
        """The index in the sequence of each local token, -1 for padding; int64 [n], for data loading."""
        return _tensor(self.arithmetic.indices(self.cp.rank))

    @property
    def valid(self) -> Tensor:
        """Whether each local token is real; bool [n], False for padding."""
        return self.indices >= 0

    @cached_property
    def positions(self) -> Tensor:
        """The RoPE position of each local token; int64 [n], 0 for padding."""
        return _tensor(self.arithmetic.positions(self.cp.rank, restart=self.restart))

    @property
    def local_boundaries(self) -> Tensor:
        """cu_seqlens of the documents among the local tokens, without padding; int64 [d + 1]."""
        return torch.from_numpy(self.arithmetic.local_boundaries(self.cp.rank))

    @property
    def imbalance(self) -> float:
        """The largest attention work of a rank divided by the mean; 1.0 is perfect balance."""
        return self.arithmetic.imbalance()

    def shard(self, x: Tensor, dim: int, fill: float | None = None) -> Tensor:
        """The local tokens of `x`, whose dimension `dim` is the whole sequence; differentiable.

        Padding takes the value `fill`. The default is 0 for floats, bools and unsigned integers, and -100 for signed
        ones, which a loss ignores as a label. Pass fill=0 (or a pad token) for token ids that will be embedded.
        """
        if x.shape[dim] != self.seq_len:
            raise ValueError(f"x has {x.shape[dim]} tokens in dim={dim}, the layout's seq_len is {self.seq_len}")
        indices = self.indices.to(x.device)
        if self.arithmetic.padding:
            if fill is None:
                fill = -100 if x.dtype.is_signed and not x.dtype.is_floating_point else 0
            shape = list(x.shape)
            shape[dim] = 1
            x = torch.cat([x, x.new_full(shape, fill)], dim)
            indices = torch.where(indices < 0, self.seq_len, indices)
        return x.index_select(dim, indices)

    def unshard(self, x: Tensor, dim: int) -> Tensor:
        """All tokens of the sequence, in order and without padding. The backward takes this rank's slice."""
        if x.shape[dim] != self.local_len:
            raise ValueError(f"x has {x.shape[dim]} tokens in dim={dim}, the layout's local_len is {self.local_len}")
        return _Unshard.apply(x, self, dim)  # type: ignore[return-value]

    def order(self) -> np.ndarray:
        """The index of each token of the sequence in the concatenation of all ranks' tokens; int64 [S]."""
        everyone = np.concatenate([self.arithmetic.indices(rank) for rank in range(self.cp.size)])
        return np.argsort(np.where(everyone < 0, self.padded_len, everyone), kind="stable")[: self.seq_len]


def _tensor(array: np.ndarray) -> Tensor:
    """A tensor that autograd may save later, even of a layout that an evaluation in inference mode has made."""
    with torch.inference_mode(False):
        return torch.from_numpy(array)


def _made_again(batch: Tensor | None, cp: Any, *arguments: Any) -> Layout:
    layout = cp.layout(*arguments)
    layout.batch = batch
    return layout


class _Unshard(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, layout: Layout, dim: int) -> Tensor:
        ctx.layout, ctx.dim = layout, dim
        whole = torch.cat(layout.cp.transport.all_gather(x.detach()), dim)
        return whole.index_select(dim, torch.from_numpy(layout.order()).to(x.device))

    @staticmethod
    def backward(ctx, *grads: Tensor):
        return ctx.layout.shard(grads[0], ctx.dim), None, None
