"""bench hierarchy: predictions and ratios from given samples, the picture, one tiny run on a real cluster."""

import json

import pytest

from longctx.bench import cluster, hierarchy
from longctx.bench.hierarchy_picture import picture
from longctx.config.base import build
from longctx.config.bench import BenchHierarchyConfig, bits_per_second
from longctx.errors import UserError
from longctx.planner.volume import busiest
from longctx.topology import Topology

SCHEDULES = ["flat_ring", "double_ring", "allgather_ring", "ulysses_ring"]


def made(config, seconds):
    """Invented measurements of the ranks: `seconds` per rate and schedule, bytes by the formulas."""
    topology, sizes = Topology(config.nodes, config.ranks), hierarchy.sizes_of(config)
    counted = {}
    for schedule in config.schedules:
        ahead, back = (
            busiest(schedule, topology, sizes, backward=backward, ulysses=config.ranks) for backward in (False, True)
        )
        whole = {level: ahead[level] + back[level] for level in ahead}
        counted[schedule] = [{"forward": ahead, "forward_backward": whole}]
    links = {config.rate: {schedule: [[1, 2]] for schedule in config.schedules}}
    return {"seconds": seconds, "bytes": counted, "links": links}


def test_predictions_add_exposed_link_time_to_the_unlimited_run():
    config = BenchHierarchyConfig(rate="10mbit", seq_len=4096)
    free = {"forward": 0.32, "forward_backward": 0.96}
    hop = 256 * 8 * 64 * 2 * 4 / (1e7 / 8 * hierarchy.PAYLOAD_SHARE)  # one KV block on one link
    flat = hierarchy.predict(config, "flat_ring", free)
    double = hierarchy.predict(config, "double_ring", free)
    assert flat["forward"] == pytest.approx(15 * hop + 0.02, abs=1e-3)  # and the last block's computation
    assert double["forward"] == pytest.approx(3 * hop + 0.08, abs=1e-3)  # the last four
    assert 4.5 < flat["forward_backward"] / double["forward_backward"] < 5.0
    fast = BenchHierarchyConfig(rate="100gbit", seq_len=4096)
    for schedule in SCHEDULES:
        assert hierarchy.predict(fast, schedule, free)["forward_backward"] == pytest.approx(0.96, rel=0.01)


def test_the_document_has_the_promised_keys(tmp_path):
    config = BenchHierarchyConfig(nodes=2, ranks=2, rate="50mbit", seq_len=1024, repeats=3)
    sample = {"forward": 1.0, "forward_backward": 3.0}
    slow = {name: [sample, {key: value * 2 for key, value in sample.items()}, sample] for name in SCHEDULES}
    slow["double_ring"] = [{"forward": 0.25, "forward_backward": 1.0}] * 3
    free = {name: [{"forward": 0.1, "forward_backward": 0.3}] for name in SCHEDULES}
    document = hierarchy.evaluate(config, made(config, {"50mbit": slow, "none": free}))
    assert document["seconds"]["flat_ring"] == sample  # medians
    assert document["ratios"]["double_ring"] == {"forward": 4.0, "forward_backward": 3.0}
    assert document["bytes_equal"]
    assert set(document["bytes"]["flat_ring"]) == {"inner", "outer"}
    assert set(document["predicted"]) == set(SCHEDULES)
    wrong = made(config, {"50mbit": slow, "none": free})
    wrong["bytes"]["double_ring"][0]["forward_backward"]["outer"] += 1
    assert not hierarchy.evaluate(config, wrong)["bytes_equal"]
    picture(document, tmp_path / "bars.png")
    assert (tmp_path / "bars.png").read_bytes().startswith(b"\x89PNG")
    assert hierarchy.table(document).row_count == 8


def test_rates_are_read_as_tc_writes_them():
    assert bits_per_second("10mbit") == 1e7
    assert bits_per_second("1.5Gbit") == 1.5e9
    for wrong in ("10", "fast", "0mbit", "-1mbit", "10MB"):
        with pytest.raises(ValueError, match="write it as tc does"):
            bits_per_second(wrong)


def test_bad_settings_are_refused_before_anything_starts():
    cases = [
        ({"seq_len": 100}, "seq_len=100 is not divisible by 2 x nodes x ranks = 32"),
        ({"rate": "fast"}, "rate='fast' is not a rate"),
        ({"heads": 6, "kv_heads": 4}, "heads=6 is not a multiple of kv_heads=4"),
        ({"nodes": 0}, "nodes=0 must be 1 or more"),
        ({"schedules": []}, "names nothing to measure"),
        ({"ulysses": 3}, "ulysses=3 does not divide"),
        ({"schedule": "flat"}, "did you mean schedules"),
    ]
    for values, message in cases:
        with pytest.raises(UserError, match=message.replace("(", r"\(")):
            build(BenchHierarchyConfig, values, origin="test")
    with pytest.raises(UserError, match="ulysses=4 must divide ranks=4 and heads=2"):
        hierarchy.run(BenchHierarchyConfig(heads=2, kv_heads=2))


@pytest.mark.root
@pytest.mark.skipif(cluster.missing() is not None, reason=str(cluster.missing()))
def test_two_nodes_behind_a_slow_link(tmp_path):
    """The link is the bottleneck (256 KiB a hop at 4 Mbit/s); times on a busy machine show no more."""
    config = BenchHierarchyConfig(
        nodes=2,
        ranks=1,
        rate="4mbit",
        seq_len=2048,
        heads=2,
        kv_heads=2,
        head_dim=16,
        schedules=["flat_ring", "double_ring"],
        repeats=1,
        out=str(tmp_path),
        timeout_seconds=200,
    )
    assert hierarchy.run(config) == 0
    document = json.loads((tmp_path / "hierarchy.json").read_text())
    assert document["bytes_equal"]
    hop = 1024 * 2 * 16 * 2 * 4
    for schedule in ("flat_ring", "double_ring"):
        assert document["bytes"][schedule] == {"inner": 0, "outer": 3 * hop}
        assert document["link_bytes"][schedule] >= 3 * hop  # the kernel's own count, headers included
        assert document["seconds"][schedule]["forward"] > 0.7 * hop / (4e6 / 8)
    assert (tmp_path / "hierarchy.png").is_file()
