"""Exact context-parallel attention: one executor, any schedule."""

from longctx.attention.op import SAVED_OPS
from longctx.attention.parallel import ContextParallel
from longctx.attention.sequence import Layout, context_attention
from longctx.distributed.wire import PeerLost

__all__ = ["SAVED_OPS", "ContextParallel", "Layout", "PeerLost", "context_attention"]
