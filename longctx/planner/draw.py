"""Draws the timeline of a simulated schedule, as text for terminals and as SVG for pages.

Every rank has one row for its computations and one for each level of links over which it sends. A computation shows the
rank whose KV block it works on. A message shows its payload (k: KV, d: dKV, h: heads exchanged under Ulysses). Empty
space in a compute row is time spent waiting.
"""

from __future__ import annotations

from dataclasses import replace
from html import escape

from longctx.planner.simulate import Span, Timeline

_LEFT = 64  # where the rows begin
_DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"
# Colours after Okabe and Ito, which colour-blind readers can tell apart; computations are coloured by the block's node.
_COLOURS = {"kv": "#0072B2", "dkv": "#D55E00", "heads": "#CC79A7"}
_BLOCKS = ("#009E73", "#56B4E9", "#E69F00", "#F0E442", "#8DA0CB", "#B3B3B3", "#66C2A5", "#FC8D62")


def kind_of(span: Span) -> str:
    """The kind of a message: kv, dkv, or heads for every exchange of Ulysses."""
    return str(span.payload) if span.payload in ("kv", "dkv") else "heads"


def rows_of(timeline: Timeline, ranks: list[int]) -> list[tuple[str, list[Span]]]:
    """The rows (label, spans) from top to bottom; a level over which the rank sends nothing gets no row."""
    rows = []
    for rank in ranks:
        mine = [span for span in timeline.spans if span.rank == rank]
        computing = [single for span in mine if span.kind == "compute" for single in _per_block(span)]
        rows.append((f"rank {rank}", computing))
        for kind in ("inner", "outer"):
            sent = [span for span in mine if span.kind == kind]
            rows += [(kind, sent)] if sent else []
    return rows


def _per_block(span: Span) -> list[Span]:
    """Split a computation on several gathered blocks into equal parts, one per block."""
    count = len(span.blocks)
    edges = [span.start + (span.end - span.start) * i / count for i in range(count + 1)]
    return [replace(span, start=edges[i], end=edges[i + 1], blocks=(span.blocks[i],)) for i in range(count)]


def as_text(timeline: Timeline, *, width: int = 100, ranks: list[int] | None = None) -> str:
    """Draw the timeline in ASCII, `width` columns wide; a message that takes no time is one column wide."""
    shown = list(range(timeline.ranks)) if ranks is None else ranks
    scale = width / timeline.seconds if timeline.seconds else 0.0
    lines = []
    for label, spans in rows_of(timeline, shown):
        cells = [" "] * width
        for span in spans:
            first = min(int(span.start * scale), width - 1)
            last = min(max(int(span.end * scale), first + 1), width)
            mark = _DIGITS[span.blocks[0] % 36] if span.kind == "compute" else kind_of(span)[0]
            cells[first:last] = mark * (last - first)
            if last - first > 1 and last < width:
                cells[last - 1] = " " if span.kind == "compute" else cells[last - 1]
        lines.append(f"{label:>8} |{''.join(cells)}|")
    legend = "compute rows: the KV block's owner; links: k = KV, d = dKV, h = heads"
    return "\n".join([*lines, f"{'':8}  0{_seconds(timeline.seconds):>{width - 1}}", f"{'':8}  {legend}"])


def as_svg(timeline: Timeline, title: str, *, nodes: int, width: int = 960, ranks: list[int] | None = None) -> str:
    """Draw the timeline as a standalone SVG document."""
    shown = list(range(timeline.ranks)) if ranks is None else ranks
    blocks = 1 + max(span.blocks[0] for span in timeline.spans if span.kind == "compute")
    per_node = max(1, blocks // nodes)  # a Ulysses group owns one block together
    right, y = width - 16, 56.0
    scale = (right - _LEFT) / timeline.seconds if timeline.seconds else 0.0
    parts: list[str] = []
    for label, spans in rows_of(timeline, shown):
        computing = label.startswith("rank")
        height, gap, size = (18, 8, 12) if computing else (9, 0, 9)
        y += gap
        parts.append(_text(_LEFT - 6, y + height - (5 if computing else 1), label, size, "end"))
        parts.append(_rectangle(_LEFT, y, right - _LEFT, height, "#f4f4f4"))
        parts += [_box(span, y, height, scale, per_node) for span in spans]
        y += height + 2
    for i, anchor in enumerate(("start", "middle", "middle", "middle", "end")):
        x = _LEFT + (right - _LEFT) * i / 4
        parts.append(_text(x, y + 14, _seconds(timeline.seconds * i / 4), 10, anchor))
    size = f'viewBox="0 0 {width} {y + 26:.0f}" width="{width}" height="{y + 26:.0f}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif">'
    background = '<rect width="100%" height="100%" fill="white"/>'
    return head + background + _text(12, 22, escape(title), 15) + _legend() + "".join(parts) + "</svg>\n"


def _box(span: Span, y: float, height: float, scale: float, per_node: int) -> str:
    x, w = _LEFT + span.start * scale, max((span.end - span.start) * scale, 1.0)
    block = span.blocks[0]
    if span.kind == "compute":
        fill = _BLOCKS[block // per_node % len(_BLOCKS)]
        what = f"hop {span.hop}: computes on block {block}"
    else:
        fill = _COLOURS[kind_of(span)]
        what = f"hop {span.hop}: {span.payload} of block {block} to rank {span.peer}"
    tip = f"<title>{what}, {_seconds(span.start)} to {_seconds(span.end)}</title>"
    box = _rectangle(x, y, w, height, fill, tip)
    if span.kind == "compute" and w > 8 * len(str(block)):
        box += _text(x + w / 2, y + height - 5, str(block), 11, "middle")
    return box


def _rectangle(x: float, y: float, width: float, height: float, fill: str, inside: str = "") -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}"'
    return f'<rect {place} fill="{fill}" stroke="white" stroke-width="0.6">{inside}</rect>'


def _text(x: float, y: float, text: str, size: int, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}">{text}</text>'


def _legend() -> str:
    items = [(_BLOCKS[0], "computes on this rank's block; one colour per node")]
    items += [(_COLOURS["kv"], "KV"), (_COLOURS["dkv"], "dKV"), (_COLOURS["heads"], "heads (Ulysses)")]
    out, x = "", float(_LEFT)
    for colour, text in items:
        out += _rectangle(x, 34, 10, 10, colour) + _text(x + 14, 43, text, 11)
        x += 30 + 6 * len(text)
    return out


def _seconds(value: float) -> str:
    units = (("s", 1.0), ("ms", 1e3), ("us", 1e6))
    unit, factor = next((pair for pair in units if value * pair[1] >= 1), units[-1])
    return f"{value * factor:.3g} {unit}" if value else "0"
