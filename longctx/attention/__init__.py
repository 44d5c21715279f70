"""Exact context-parallel attention: one executor runs every schedule."""

from longctx.attention.context import context_attention
from longctx.attention.local_layout import Layout
from longctx.attention.op import SAVED_OPS
from longctx.attention.parallel import ContextParallel
from longctx.distributed.transport import PeerLost

__all__ = ["SAVED_OPS", "ContextParallel", "Layout", "PeerLost", "context_attention"]
