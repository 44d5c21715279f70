from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longctx.config.base import build
from longctx.config.data import DataConfig
from longctx.data.mixing import rng_of
from longctx.data.stage_packing import describe_padding, pack_stage
from longctx.errors import UserError

TEXTS = {"a": {"kind": "text", "path": "a"}, "b": {"kind": "text", "path": "b"}}
NEEDLES = {"kind": "synth", "haystack": "a", "task": {"kind": "needle"}}


def _config(mix, sources=None, **more):
    values = {"sources": sources or {**TEXTS, "needles": NEEDLES}, "mixes": {"m": mix}, **more}
    return build(DataConfig, values, origin="test")


def _packing(config, lengths, seq_len, sequences, seed=0, stage="s"):
    return pack_stage(config, config.mixes["m"], lengths, seq_len=seq_len, sequences=sequences, seed=seed, stage=stage)


def _lengths(count, seed, top=4000):
    return np.minimum(np.exp(rng_of(seed).normal(5.5, 1.2, count)).astype(np.int32) + 1, top)


def _check_sequences(packing):
    """Every sequence is full or padded and never too long; no token of a document occurs twice within an epoch."""
    filled = np.array([packing.length[a:b].sum() for a, b in zip(packing.first, packing.first[1:], strict=False)])
    assert (filled <= packing.seq_len).all()
    assert (packing.length > 0).all()
    assert packing.padding == pytest.approx(1 - filled.sum() / (len(packing) * packing.seq_len))


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**31),
    seq_len=st.sampled_from([64, 512, 2048]),
    sequences=st.integers(1, 40),
    packing=st.sampled_from(["best_fit", "concat"]),
    needles=st.sampled_from([0.0, 0.35, 1.0]),
    synth=st.sampled_from(["full", {"loguniform": {"min_len": 32}}, {"fixed": {"length": 48}}]),
    policy=st.sampled_from(
        [
            "natural",
            "joined",
            {"upsample": {"min_len": 200, "share": 0.5}},
            {"prolong": {"share": 0.5}},
            {"cut": {"length": 100}},
        ]
    ),
)
def test_plans_hold_exactly_what_they_promise(seed, seq_len, sequences, packing, needles, synth, policy):
    mix = {
        "a": {"weight": 0.75 * (1 - needles), "length": policy},
        "b": 0.25 * (1 - needles),
        "needles": {"weight": needles, "length": synth},
    }
    lengths = {"a": _lengths(50, 1), "b": _lengths(8, 2)}
    config = _config(mix, packing=packing)
    packing = _packing(config, lengths, seq_len, sequences, seed)
    assert len(packing) == sequences
    _check_sequences(packing)
    again = _packing(config, lengths, seq_len, sequences, seed)
    for name in ("first", "source", "document", "start", "length", "joined"):
        assert np.array_equal(getattr(packing, name), getattr(again, name))
    for name in ("a", "b"):
        mine = (
            packing.source == packing.names.index(name)
            if name in packing.names
            else np.zeros(len(packing.source), bool)
        )
        assert (packing.start[mine] + packing.length[mine] <= lengths[name][packing.document[mine]]).all()


@settings(max_examples=40)
@given(seed=st.integers(0, 2**31), packing=st.sampled_from(["best_fit", "concat"]), epochs=st.integers(1, 3))
def test_whole_epochs_give_every_token_equally_often(seed, packing, epochs):
    lengths = np.array(rng_of(seed).integers(1, 900, size=30), np.int32)
    seq_len = 256
    lengths[-1] += -int(lengths.sum()) % seq_len  # so that epochs end with a sequence
    sequences = epochs * int(lengths.sum()) // seq_len
    packing = _packing(_config({"a": 1.0}, packing=packing), {"a": lengths}, seq_len, sequences, seed)
    seen = Counter()
    for document, start, length in zip(packing.document, packing.start, packing.length, strict=True):
        seen.update((int(document), int(start) + i) for i in range(int(length)))
    assert max(seen.values()) <= epochs
    if packing == "concat":  # nothing is left over, so every token is there, equally often
        assert len(seen) == lengths.sum()
        assert set(seen.values()) == {epochs}
    else:
        assert sum(seen.values()) == round(sequences * seq_len * (1 - packing.padding))


def test_mix_weights_are_shares_of_tokens():
    lengths = {"a": _lengths(3000, 1), "b": _lengths(3000, 2)}
    packing = _packing(_config({"a": 0.5, "b": 0.2, "needles": 0.3}), lengths, 1024, 200)
    total = 200 * 1024
    for name, share in (("a", 0.5), ("b", 0.2), ("needles", 0.3)):
        assert packing.use[name].tokens / total == pytest.approx(share, abs=0.01)
    assert packing.padding < 0.01


def test_a_mix_may_have_hundreds_of_sources():
    names = [f"s{number}" for number in range(200)]
    values = {"sources": dict.fromkeys(names, TEXTS["a"]), "mixes": {"m": dict.fromkeys(names, 1 / 200)}}
    packing = _packing(build(DataConfig, values, origin="test"), dict.fromkeys(names, _lengths(5, 1)), 64, 400)
    assert {packing.names[number] for number in packing.source} == {*names}


def test_upsample_changes_lengths_and_leaves_shares():
    lengths = {"a": _lengths(5000, 1), "b": _lengths(5000, 2)}
    mix = {"a": {"weight": 0.6, "length": {"upsample": {"min_len": 1000, "share": 0.8}}}, "b": 0.4}
    packing = _packing(_config(mix), lengths, 8192, 60)
    mine = packing.source == 0
    long = lengths["a"][packing.document] >= 1000
    assert packing.length[mine].sum() / (60 * 8192) == pytest.approx(0.6, abs=0.01)
    assert packing.length[mine & long].sum() / packing.length[mine].sum() == pytest.approx(0.8, abs=0.02)


def test_prolong_gives_full_sequences_of_single_documents():
    lengths = {"a": np.r_[_lengths(3000, 1), rng_of(3).integers(3000, 20_000, 60)].astype(np.int32)}
    packing = _packing(_config({"a": {"weight": 1.0, "length": {"prolong": {"share": 0.75}}}}), lengths, 2048, 100)
    pieces = np.diff(packing.first)
    full = [i for i in range(100) if pieces[i] == 1 and packing.length[packing.first[i]] == 2048]
    assert len(full) == 75
    for i in full:
        piece = packing.first[i]
        assert packing.start[piece] % 2048 == 0
        assert lengths["a"][packing.document[piece]] >= 2048


def test_joined_conversations_fill_sequences_without_boundaries():
    packing = _packing(_config({"a": {"weight": 1.0, "length": "joined"}}), {"a": _lengths(500, 1)}, 1024, 20)
    assert packing.padding == 0
    assert not packing.joined[packing.first[:-1]].any()
    inner = np.ones(len(packing.joined), bool)
    inner[packing.first[:-1]] = False
    assert packing.joined[inner].all()


@pytest.mark.parametrize("packing", ["best_fit", "concat"])
def test_cut_documents_are_read_whole_in_pieces_of_at_most_the_length(packing):
    lengths = {"a": np.array([100, 101, 250, 3000, 40], np.int32), "b": _lengths(50, 2)}
    whole = int(lengths["a"].sum())
    mix = {"a": {"weight": 0.5, "length": {"cut": {"length": 100}}}, "b": 0.5}
    sequences = -(-2 * whole // 2048)
    packed = _packing(_config(mix, packing=packing), lengths, 2048, sequences)
    mine = packed.source == 0
    assert packed.length[mine].max() == 100
    assert not packed.joined[mine].any()
    assert not (packed.start[mine] % 100).any() or packing == "concat"  # concat splits pieces at a sequence's end too
    pieces = Counter(zip(packed.document[mine].tolist(), (packed.start[mine] // 100).tolist(), strict=True))
    assert {d for d, _ in pieces} == {0, 1, 2, 3, 4}
    assert packed.length[mine].sum() == pytest.approx(sequences * 1024, rel=0.05)
    # A length beyond the sequence's is the sequence's own, since one mix serves stages of several lengths.
    mix["a"]["length"]["cut"]["length"] = 4096
    assert _packing(_config(mix), lengths, 512, sequences).length.max() <= 512


def test_synthetic_documents_are_never_cut_not_even_by_concat():
    for packing in ("best_fit", "concat"):
        mix = {"a": 0.5, "needles": {"weight": 0.5, "length": {"loguniform": {"min_len": 100}}}}
        packing = _packing(_config(mix, packing=packing), {"a": _lengths(500, 1)}, 700, 50)
        mine = packing.source == 1
        assert (packing.start[mine] == 0).all()
        assert len(set(packing.document[mine])) == mine.sum()
        assert packing.length[mine].min() >= 100
        assert packing.length[mine].max() <= 700


def test_seed_and_stage_change_the_order_and_nothing_else():
    lengths = {"a": _lengths(300, 1)}
    config = _config({"a": 1.0})
    plans = [_packing(config, lengths, 512, 40, seed, stage) for seed, stage in ((0, "s"), (1, "s"), (0, "t"))]
    assert not np.array_equal(plans[0].document, plans[1].document)
    assert not np.array_equal(plans[0].document, plans[2].document)


def test_epochs_are_counted():
    lengths = {"a": np.full(10, 100, np.int32)}
    packing = _packing(_config({"a": 1.0}), lengths, 500, 7)
    assert packing.use["a"].epochs == pytest.approx(3.5)
    assert packing.use["a"].documents == 10


def test_policies_that_cannot_be_met_say_how_many_tokens_are_missing():
    lengths = {"a": np.array([100, 3000], np.int32)}
    mix = {"a": {"weight": 1.0, "length": {"prolong": {"share": 0.5}}}}
    with pytest.raises(UserError, match=r"longest has 3,000, 5,192 tokens are missing"):
        _packing(_config(mix), lengths, 8192, 4)
    mix = {"a": {"weight": 1.0, "length": {"upsample": {"min_len": 4000, "share": 0.5}}}}
    with pytest.raises(UserError, match=r"1,000 tokens are missing"):
        _packing(_config(mix), lengths, 8192, 4)
    with pytest.raises(UserError, match="no document to draw"):
        _packing(_config({"a": 1.0}), {"a": np.zeros(0, np.int32)}, 512, 4)
    mix = {"needles": {"weight": 1.0, "length": {"fixed": {"length": 1000}}}}
    with pytest.raises(UserError, match="1,000 tokens in sequences of 512"):
        _packing(_config(mix), {}, 512, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mixes": {"m": {"a": -0.5, "b": 1.5}}}, "m.a.weight=-0.5 must be 0 or more"),
        ({"mixes": {"m": {"a": 0.5, "b": 0.2}}}, r"sum to 0\.7, not to 1"),
        ({"mixes": {"m": {"aa": 1.0}}}, "did you mean 'a'"),
        ({"mixes": {"m": {"a": {"weight": 1.0, "length": "full"}}}}, "does not fit a text source"),
        ({"mixes": {"m": {"needles": {"weight": 1.0, "length": "natural"}}}}, "does not fit a synth source"),
        ({"mixes": {"m": {"a": {"weight": 1, "length": {"prolong": {"min_len": 5}}}}}}, "does not apply"),
        ({"mixes": {"m": {"a": {"weight": 1, "length": "cut"}}}}, "length is missing for the length policy cut"),
        ({"mixes": {"m": {"needles": {"weight": 1, "length": {"cut": {"length": 9}}}}}}, "does not fit a synth source"),
        ({"first_token": "predict"}, "document_mask=false"),
        ({"sources": {"a": {"kind": "text"}}}, "path is missing"),
        ({"sources": {"a": {"kind": "text", "path": "x", "loss": "assistant"}}}, "belong to kind=chat"),
        ({"sources": {"a": {"kind": "chat", "path": "x", "loss": "assistant", "answer_weight": 2}}}, "carry no loss"),
        ({"sources": {**TEXTS, "n": {**NEEDLES, "haystack": "zz"}}}, "not a source of text"),
        ({"sources": {"a": {"kind": "text", "path": "x", "feild": "y"}}}, "did you mean sources.a.field"),
    ],
)  # fmt: skip
def test_bad_configs_are_refused_with_a_remedy(change, message):
    values = {"sources": {**TEXTS, "needles": NEEDLES}, "mixes": {"m": {"a": 1.0}}, **change}
    with pytest.raises(UserError, match=message):
        build(DataConfig, values, origin="test")


def test_more_sequences_than_the_host_holds_are_refused_before_they_are_drawn():
    with pytest.raises(
        UserError, match=r"curriculum\.stages\.s: packing 1,000,000,000,000 sequences of 64 tokens takes"
    ):
        _packing(_config({"a": 1.0}), {"a": _lengths(9, 1)}, 64, 10**12, stage="s/train")


CUT = {"a": {"weight": 1.0, "length": {"cut": {"length": 5000}}}}
EVEN = {"a": {"weight": 1.0, "length": {"cut": {"length": 4096}}}}
FIXED = {"needles": {"weight": 0.9, "length": {"fixed": {"length": 3000}}}, "a": 0.1}


@pytest.mark.parametrize(
    ("mix", "packing", "said"),
    [
        (CUT, "best_fit", ["source a (length policy cut)", "4,096 tokens (data.mixes.m.a.length)", "packing=concat"]),
        (EVEN, "best_fit", []),
        (CUT, "concat", []),
        ({"a": 1.0}, "best_fit", []),
        ({"b": 1.0}, "best_fit", ["source b (length policy natural)", "set data.packing=concat"]),
        (FIXED, "best_fit", ["source needles (length policy fixed)", "take a length of 2,730 tokens"]),
    ],
)
def test_a_stage_of_padding_names_its_cause_and_the_way_out(mix, packing, said):
    """Documents of source b are a little longer than half of a sequence."""
    lengths = {"a": _lengths(4000, 0, top=200_000) * 40, "b": np.full(300, 5000, np.int32)}
    config = _config(mix, packing=packing)
    packed = _packing(config, lengths, 8192, 200)
    text = describe_padding(config, "m", packed, "s8192")
    assert (packed.padding > 0.1) == (text is not None) == bool(said)
    assert not said or f"stage s8192: {packed.padding:.0%} of its positions are padding" in str(text)
    assert all(words in str(text) for words in said)
