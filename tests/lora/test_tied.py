"""Embedding and output layer, one weight or two: in the base, in the tuned model and in the sibling.

The oracle is transformers, which decides from config and file how many weights there are, and PeftModel.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from longctx.config.lora import ExtractConfig, MergeConfig, MergeRope
from longctx.errors import UserError
from longctx.lora.describe import describe
from longctx.lora.extract import extract
from longctx.lora.merge import merge

from .conftest import build, change, load, logits

KEEP = MergeRope(rule="keep")
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
Store = Callable[..., str]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """store(name, tied, seed, head): a model that differs from seed 0 in its matrices alone, saved once.

    head: `usual`, `twice` (the tied weight under both names), `other` (another one under lm_head), `only` (under
    lm_head alone).
    """
    folder, made = tmp_path_factory.mktemp("tied"), dict[tuple[Any, ...], str]()

    def make(tied: bool, seed: int, head: str = "usual") -> str:
        key = (tied, seed, head)
        if key not in made:
            path = folder / f"{tied}-{seed}-{head}"
            model = build("llama", tied=tied, hidden_size=32, intermediate_size=48, num_attention_heads=2,
                          num_key_value_heads=1)  # fmt: skip
            norms = {name: value.clone() for name, value in model.state_dict().items() if value.dim() == 1}
            if seed:
                change(model, seed=seed)
            model.load_state_dict(norms, strict=False)
            model.save_pretrained(path)
            weights = load_file(path / "model.safetensors")
            if head in ("twice", "other"):
                weights[HEAD] = weights[EMBED] + (0.1 * torch.randn(96, 32) if head == "other" else 0)
            elif head == "only":
                weights[HEAD] = weights.pop(EMBED)
            save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
            made[key] = str(path)
        return made[key]

    return make


def full_rank(base: str, tuned: str, out: Path, **settings: Any) -> str:
    settings = {"rank": 96, "dtype": "float32", "embeddings": True, **settings}
    extract(ExtractConfig(base=base, tuned=tuned, out=str(out), **settings))
    return str(out)


def peft_trained(model: Any, path: Path, **settings: Any) -> str:
    """An adapter as peft saves it, with all weights changed a little, the base's included."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trained = get_peft_model(model, LoraConfig(r=4, task_type="CAUSAL_LM", **settings))
        torch.manual_seed(6)
        with torch.no_grad():
            for parameter in trained.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape))
        trained.save_pretrained(str(path))
    return str(path)


def merged(target: str, adapter: str, out: Path, **settings: Any) -> Any:
    merge(MergeConfig(target=target, adapter=[adapter], out=str(out), rope=KEEP, **settings))
    return load(str(out))


def peft(target: str, adapter: str, **how: Any) -> torch.Tensor:
    """The logits that peft computes unmerged; no part of the adapter may be missing."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing adapter keys.*")
        return logits(PeftModel.from_pretrained(load(target), adapter, **how).eval())


def near(got: torch.Tensor, want: torch.Tensor) -> bool:
    return torch.allclose(got, want, rtol=0, atol=1e-5)


def tables(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return model.get_input_embeddings().weight, model.get_output_embeddings().weight


@pytest.mark.parametrize("settings", [{}, {"rslora": True}, {"share": 1.0, "max_rank": 96}, {"rank": 24}], ids=str)
def test_our_adapter_of_a_tied_model_is_whole_in_peft(store: Store, tmp_path: Path, settings: dict[str, Any]) -> None:
    base, tuned = store(True, 0), store(True, 1)
    adapter = full_rank(base, tuned, tmp_path / "a", **settings)
    assert json.loads((tmp_path / "a/adapter_config.json").read_text())["ensure_weight_tying"] is True
    assert "one weight: to load this adapter take peft 0.21" in (tmp_path / "a/README.md").read_text()
    assert describe(str(tmp_path / "a")).one_weight
    model = merged(base, adapter, tmp_path / "m")
    assert near(peft(base, adapter), logits(model))
    assert near(logits(model), logits(load(tuned))) == ("rank" not in settings)  # a rank of 24 loses something
    assert tables(model)[0] is tables(model)[1]
    # Loaders that build the adapter without memory, and transformers' own, need the output layer's factors stored.
    assert near(peft(base, adapter, low_cpu_mem_usage=True), logits(model))
    plain = load(base)
    plain.load_adapter(adapter)
    assert near(logits(plain), logits(model))


@pytest.mark.parametrize("tuned_tied", [True, False])
@pytest.mark.parametrize("head", ["usual", "twice", "only"])
def test_pairs_that_differ_in_their_tying(store: Store, tmp_path: Path, head: str, tuned_tied: bool) -> None:
    """base + adapter is the tuned model, whichever of the two has one weight and however it is stored."""
    for number, (first, second) in enumerate((((True, 0, head), (tuned_tied, 1)), ((tuned_tied, 1), (True, 0, head)))):
        base, tuned = store(*first), store(*second)
        adapter = full_rank(base, tuned, tmp_path / f"a{number}")
        want = logits(load(tuned))
        assert near(logits(merged(base, adapter, tmp_path / f"m{number}")), want)
        assert near(peft(base, adapter), want)


@pytest.mark.parametrize("head", ["usual", "twice", "other", "only"])
@pytest.mark.parametrize("pair_tied", [True, False])
def test_tied_siblings_become_what_peft_computes(store: Store, tmp_path: Path, pair_tied: bool, head: str) -> None:
    adapter = full_rank(store(pair_tied, 0), store(pair_tied, 1), tmp_path / "a")
    sibling = store(True, 2, head)
    model = merged(sibling, adapter, tmp_path / "m")
    assert near(logits(model), peft(sibling, adapter))
    before, after = tables(load(sibling)), tables(model)
    first, second = tables(load(store(pair_tied, 0))), tables(load(store(pair_tied, 1)))
    for old, new, base, tuned in zip(before, after, first, second, strict=True):
        assert torch.allclose(new - old, tuned - base, atol=1e-5)
    assert model.config.tie_word_embeddings == (pair_tied and head != "other")


def test_an_untied_sibling_of_a_tied_pair_gets_both_shares(store: Store, tmp_path: Path) -> None:
    adapter, sibling = full_rank(store(True, 0), store(True, 1), tmp_path / "a"), store(False, 2)
    model = merged(sibling, adapter, tmp_path / "m")
    assert near(logits(model), peft(sibling, adapter))
    moved = tables(load(store(True, 1)))[0] - tables(load(store(True, 0)))[0]
    for old, new in zip(tables(load(sibling)), tables(model), strict=True):
        assert torch.allclose(new - old, moved, atol=1e-5)


def test_an_untied_sibling_of_a_tied_pair_of_peft_is_refused(store: Store, tmp_path: Path) -> None:
    """peft stores the factors of lm_head and, in an untied model, ignores them."""
    tied = {"target_modules": ["embed_tokens"], "ensure_weight_tying": True}
    adapter, sibling = peft_trained(load(store(True, 0)), tmp_path / "a", **tied), store(False, 2)
    with pytest.raises(UserError, match="peft ignores them: lm_head"):
        merged(sibling, adapter, tmp_path / "m", copies="own")
    got = merged(sibling, adapter, tmp_path / "m", copies="adapter", allow_partial=True)
    assert near(logits(got), peft(sibling, adapter))


def test_adapters_of_tied_models_that_do_not_tell_peft(store: Store, tmp_path: Path) -> None:
    """peft would move the embedding alone, so ours refuses them."""
    adapter = Path(full_rank(store(True, 0), store(True, 1), tmp_path / "a"))
    for file, values in (
        ("adapter_config.json", {"ensure_weight_tying": False}),
        ("longctx.json", {"layout": {"tie_word_embeddings": True}}),
    ):
        content = json.loads((adapter / file).read_text())
        (adapter / file).write_text(json.dumps({**content, **values}))
    weights = load_file(adapter / "adapter_model.safetensors")
    save_file({k: v for k, v in weights.items() if "lm_head" not in k}, adapter / "adapter_model.safetensors")
    with pytest.raises(UserError, match=r'older longctx.*"ensure_weight_tying": true'):
        merged(store(True, 2), str(adapter), tmp_path / "m")


def test_a_missing_table_of_an_untied_model_is_refused(store: Store, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    load(store(False, 1)).save_pretrained(broken)
    weights = load_file(broken / "model.safetensors")
    del weights[HEAD]
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"no output layer, and its config\.json says tie_word_embeddings: false"):
        full_rank(store(False, 0), str(broken), tmp_path / "a")


def test_a_single_file_goes_before_an_index_left_beside_it(store: Store, tmp_path: Path) -> None:
    """transformers reads the folder in the same order: stale shards have no effect."""
    tuned = tmp_path / "tuned"
    load(store(False, 2)).save_pretrained(tuned, max_shard_size="20KB")
    load(store(False, 1)).save_pretrained(tmp_path / "fresh")
    (tuned / "model.safetensors").write_bytes((tmp_path / "fresh/model.safetensors").read_bytes())
    adapter = full_rank(store(False, 0), str(tuned), tmp_path / "a")
    assert near(logits(merged(store(False, 0), adapter, tmp_path / "m")), logits(load(str(tuned))))


def test_an_embedding_that_peft_cannot_tie_travels_twice(tmp_path: Path) -> None:
    """Falcon's is called word_embeddings: lm_head gets factors of its own, and a tied sibling stays tied."""
    from transformers import AutoModelForCausalLM, FalconConfig

    config = FalconConfig(
        vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, tie_word_embeddings=True,
        new_decoder_architecture=False, alibi=False, max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.add_(0.02 * torch.randn(parameter.shape))
    model.save_pretrained(tmp_path / "tuned")
    adapter = full_rank(str(tmp_path / "base"), str(tmp_path / "tuned"), tmp_path / "a")
    want = logits(load(str(tmp_path / "tuned")))
    assert near(peft(str(tmp_path / "base"), adapter), want)
    assert near(logits(merged(str(tmp_path / "base"), adapter, tmp_path / "m")), want)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj"]},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
        {"target_modules": ["q_proj"], "trainable_token_indices": [3, 97]},
        {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
    ],
    ids=str,
)
def test_vocabularies_resized_before_training(
    store: Store, tmp_path: Path, tied: bool, settings: dict[str, Any]
) -> None:
    """peft then saves embeddings whole, beside or below what it trains."""
    model = load(store(tied, 0))
    torch.manual_seed(5)
    model.resize_token_embeddings(100, mean_resizing=False)
    model.save_pretrained(tmp_path / "resized")
    target, adapter = str(tmp_path / "resized"), peft_trained(model, tmp_path / "a", **settings)
    want = peft(target, adapter)
    assert near(logits(merged(target, adapter, tmp_path / "m", copies="adapter")), want)
