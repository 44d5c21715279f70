"""Exchanges tokens for heads within a group of h ranks (Ulysses, 2309.14509): the schedule's gather and scatter hops.

Rank u of a group holds tokens [u n, (u+1) n) of its ring position and all heads. After the gather it holds all L = h n
tokens and heads [u Hq/h, (u+1) Hq/h). Tokens concatenated in rank order are in the position's order, so nothing is
permuted. If h exceeds the kv heads, h / Hkv ranks receive the same kv head, and the scatter sums their gradients.

Shapes: local [B, H, n, D], gathered [B, H / h, L, D]. lse stays gathered between forward and backward.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from longctx.attention.transfers import TransferQueue
from longctx.schedule import Hop


@dataclass(frozen=True)
class Heads:
    """The heads that each of `h` ranks works on; this rank is `me`."""

    me: int
    h: int
    q_heads: int
    kv_heads: int

    def q(self, u: int) -> slice:
        each = self.q_heads // self.h
        return slice(u * each, (u + 1) * each)

    def kv(self, u: int) -> slice:
        if self.kv_heads >= self.h:
            each = self.kv_heads // self.h
            return slice(u * each, (u + 1) * each)
        head = u * self.kv_heads // self.h
        return slice(head, head + 1)

    def of(self, tensor: Tensor, u: int) -> Tensor:
        """The heads of `tensor` that rank u works on; the number of heads tells queries from keys and values."""
        return tensor[:, self.q(u) if tensor.shape[1] == self.q_heads else self.kv(u)]


def check_heads(h: int, q_heads: int, kv_heads: int) -> None:
    """Raise ValueError unless h ranks can split the heads."""
    if q_heads % h:
        raise ValueError(f"ulysses={h} does not divide the {q_heads} query heads")
    if kv_heads % h and h % kv_heads:
        raise ValueError(f"ulysses={h} and the {kv_heads} kv heads: one must divide the other")


def gather(hop: Hop, transfers: TransferQueue, heads: Heads, tensors: list[Tensor]) -> list[Tensor]:
    """Gather tokens and split heads: each [B, H, n, D] -> [B, H / h, h n, D]; one message per peer carries them all."""
    n = tensors[0].shape[2]
    outs = []
    for x in tensors:
        mine = heads.of(x, heads.me)
        out = x.new_empty((*mine.shape[:2], heads.h * n, x.shape[3]))
        out[:, :, heads.me * n : (heads.me + 1) * n] = mine
        outs.append(out)
    received = []
    for transfer in hop.post:
        to, source = transfer.send.peer % heads.h, transfer.recv.peer % heads.h
        send = torch.cat([heads.of(x, to).reshape(-1) for x in tensors])
        recv = torch.empty_like(send)
        transfers.post(-1, transfer, send, recv)
        received.append((source, recv, send))
    transfers.wait(-1, hop.wait)
    for source, recv, _ in received:
        at = 0
        for out in outs:
            part = out[:, :, source * n : (source + 1) * n]
            part.copy_(recv[at : at + part.numel()].view(part.shape))
            at += part.numel()
    return outs


def scatter(hop: Hop, transfers: TransferQueue, heads: Heads, tensors: list[Tensor], outs: list[Tensor]) -> None:
    """Undo `gather`: *add* each [B, H / h, h n, D] to its heads of `outs` [B, H, n, D]."""
    n = outs[0].shape[2]
    received = []
    for transfer in hop.post:
        to, source = transfer.send.peer % heads.h, transfer.recv.peer % heads.h
        send = torch.cat([x[:, :, to * n : (to + 1) * n].reshape(-1) for x in tensors])
        recv = torch.empty_like(send)
        transfers.post(-1, transfer, send, recv)
        received.append((source, recv, send))
    for x, out in zip(tensors, outs, strict=True):
        heads.of(out, heads.me).add_(x[:, :, heads.me * n : (heads.me + 1) * n])
    transfers.wait(-1, hop.wait)
    for source, recv, _ in received:
        at = 0
        for out in outs:
            part = heads.of(out, source)
            part.add_(recv[at : at + part.numel()].view(part.shape))
            at += part.numel()
