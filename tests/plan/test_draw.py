"""Drawn timelines: one row per rank and used level, proportional, and SVG that parses."""

import xml.etree.ElementTree as ElementTree

from longctx.planner.draw import as_svg, as_text, rows_of
from longctx.planner.simulate import evenly, simulate
from longctx.schedule import Sizes, build, payload_bytes
from longctx.topology import Link, Topology

SIZES = Sizes(tokens=64, q_heads=8, kv_heads=8, head_dim=16, wire_bytes=4, grad_bytes=4)
KV = payload_bytes("kv", SIZES)


def timeline(schedule, nodes, ranks, backward=False, links=None):
    topology = Topology(nodes, ranks)
    plans = [build(schedule, topology, rank, backward=backward) for rank in range(topology.size)]
    return simulate(plans, SIZES, evenly(1.0), links or {"inner": Link(KV / 0.5), "outer": Link(KV / 2.0)})


def test_text_shows_blocks_in_the_order_they_are_computed():
    text = as_text(timeline("double_ring", 2, 2), width=80)
    first = text.splitlines()[0]
    assert first.startswith("  rank 0 |")
    order = list(dict.fromkeys(first.split("|")[1].replace(" ", "")))
    assert order == ["0", "1", "2", "3"]
    assert all(len(line) == len(first) for line in text.splitlines() if line.endswith("|"))


def test_only_used_links_get_rows():
    labels = [label for label, _ in rows_of(timeline("flat_ring", 2, 2), [0, 1])]
    assert labels == ["rank 0", "inner", "rank 1", "outer"]


def test_outer_transfer_spans_its_share_of_the_width():
    row = as_text(timeline("double_ring", 2, 1, links={"outer": Link(KV / 3.0)}), width=80).splitlines()[1]
    assert row.strip().startswith("outer")
    assert row.count("k") == 60  # three of four seconds


def test_gathered_blocks_are_drawn_one_by_one():
    first = as_text(timeline("allgather_ring", 1, 4), width=80).splitlines()[0]
    assert list(dict.fromkeys(first.split("|")[1].replace(" ", ""))) == ["0", "3", "2", "1"]


def test_svg_is_well_formed_and_names_every_message():
    made = timeline("double_ring", 2, 2, backward=True)
    root = ElementTree.fromstring(as_svg(made, "double ring <backward>", nodes=2))
    space = "{http://www.w3.org/2000/svg}"
    tips = [element.text or "" for element in root.iter(f"{space}title")]
    assert len(tips) == len(made.spans)
    assert sum("dkv of block" in tip for tip in tips) == sum(span.payload == "dkv" for span in made.spans)
    widest = max(
        float(box.get("x", 0)) + float(box.get("width"))
        for box in root.iter(f"{space}rect")
        if "%" not in box.get("width")
    )
    assert widest <= 960
