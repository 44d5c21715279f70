"""The bytes that a rank sends per attention call, in closed form; schedules and byte counters must equal them.

n = S / N tokens per rank, K = n Hkv d and Q = n Hq d elements, b bytes per sent element, g bytes per element of a
travelling gradient, rho = max(1, h / Hkv). The counts are the smallest that a ring needs: a rank does not send its
contribution to its own KV block, and the receiver of a foreign group's block does not send its contribution before the
inner ring ends.
"""

from __future__ import annotations

from longctx.schedule import Sizes
from longctx.topology import Level, Topology


def busiest(schedule: str, topology: Topology, sizes: Sizes, *, backward: bool, ulysses: int = 1) -> dict[Level, int]:
    """Bytes that the busiest rank sends over each level in one pass, for one document.

    In a flat ring different ranks send within a node and across nodes: (N-1) x 2K elements each.
    """
    m, w, n = topology.nodes, topology.ranks, topology.size
    k = sizes.batch * sizes.tokens * sizes.kv_heads * sizes.head_dim
    q = sizes.batch * sizes.tokens * sizes.q_heads * sizes.head_dim
    b, g = sizes.wire_bytes, sizes.grad_bytes
    hop = 2 * k * (b + g if backward else b)
    if schedule == "flat_ring":
        return {"inner": (n - 1) * hop if w > 1 else 0, "outer": (n - 1) * hop if m > 1 else 0}
    if schedule in ("double_ring", "allgather_ring"):
        return {"inner": m * (w - 1) * hop, "outer": (m - 1) * hop}
    if schedule != "ulysses_ring":
        raise ValueError(f"schedule={schedule!r} has no formula here")
    h = ulysses
    rho = max(1, h // sizes.kv_heads) if h > 1 else 1
    hops = (n // h - 1) * rho * hop
    exchanged = (4 * q + 2 * rho * k) * b + 2 * rho * k * g if backward else (2 * q + 2 * rho * k) * b
    inside = exchanged * (h - 1) // h
    # If h < W, some hops of the ring stay inside the node and add to the inner bytes of the exchange of heads.
    return {"inner": inside + (hops if h < w else 0), "outer": hops if m > 1 else 0}
