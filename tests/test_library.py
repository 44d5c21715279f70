"""The public API: every docstring's example runs, nothing heavy loads early, and its parts train a model together.

MODEL in the examples is the tiny Llama that ships in longctx/assets, TUNED is it with a longer window and changed
weights, TEXT a few thousand words, OUT an empty folder.
"""

from __future__ import annotations

import ast
import copy
import doctest
import inspect
import json
import math
import pickle
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

import longctx
from longctx.assets import tiny_model
from longctx.errors import UserError
from tests import warm
from tests.dist.parity import oracle
from tests.dist.ranks import run_ranks

DOCS = Path(__file__).parents[1] / "docs"
NAMES = [name for name in longctx.__all__ if name != "__version__"]
TEXT = "def area(width, height):\n    return width * height\n\n\nclass Shape:\n    sides = 4\n\n" * 40
STEPS, SEQ_LEN = 3, 96


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama with another window and slightly changed weights."""
    folder = tmp_path_factory.mktemp("library") / "tuned"
    model = AutoModelForCausalLM.from_pretrained(tiny_model())
    longctx.set_rope(model, *longctx.rope_for(model, window=2048))
    torch.manual_seed(0)
    with torch.no_grad():
        for layer in model.model.layers:
            weight = layer.self_attn.q_proj.weight
            weight += 0.02 * torch.randn(len(weight), 4) @ torch.randn(4, weight.shape[1])
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model()).save_pretrained(folder)
    return folder


def examples(docstring: str) -> list[doctest.Example]:
    return doctest.DocTestParser().get_examples(inspect.cleandoc(docstring))


# ---- the examples


@pytest.mark.parametrize("name", NAMES)
def test_the_example_of_a_docstring_runs(name: str, tuned: Path, tmp_path: Path):
    text = inspect.cleandoc(getattr(longctx, name).__doc__)
    names = {"MODEL": str(tiny_model()), "TUNED": str(tuned), "OUT": str(tmp_path), "TEXT": TEXT}
    test = doctest.DocTestParser().get_doctest(text, names, name, None, 0)
    said: list[str] = []
    failed, tried = doctest.DocTestRunner().run(test, out=said.append)
    assert tried >= 2, f"{name} has no example"
    assert failed == 0, "".join(said)


def test_the_page_has_every_name_with_its_signature_and_example():
    """docs/api.md: one section per name, with its signature, those of its methods, and the docstring's example."""
    page = (DOCS / "api.md").read_text()
    sections = dict(re.findall(r"^## `(\w+)`\n(.*?)(?=^## |\Z)", page, re.M | re.S))
    assert sorted(sections) == sorted(NAMES)
    for name, text in sections.items():
        thing, blocks = getattr(longctx, name), re.findall(r"```python\n(.*?)```", text, re.S)
        shown = [(e.source, e.want) for block in blocks if block.startswith(">>>") for e in examples(block)]
        assert shown == [(e.source, e.want) for e in examples(thing.__doc__)], name
        if inspect.isfunction(thing):
            assert _plain(blocks[0]) == _plain(name + _signature(thing))
        else:
            methods = re.findall(r"^\| `(\w+)(\(.*?\))`", text, re.M)
            assert methods or name == "LossModel"
            for method, arguments in methods:
                assert _plain(method + arguments) == _plain(method + _signature(getattr(thing, method))), name


def _signature(function: Any) -> str:
    """The parameters of a function and their defaults, without types and without self."""
    signature = inspect.signature(function)
    parameters = [p.replace(annotation=p.empty) for p in signature.parameters.values() if p.name != "self"]
    return str(signature.replace(parameters=parameters, return_annotation=signature.empty))


def _plain(call: str) -> str:
    return ast.unparse(ast.parse(f"def {call.strip()}: ..."))


# ---- what importing loads


def test_importing_the_package_loads_neither_torch_nor_transformers():
    heavy = "[m for m in ('torch', 'transformers', 'hydra', 'numpy', 'pydantic') if m in sys.modules]"
    code = f"""
import json, sys
import longctx
first = {heavy}
rope = longctx.rope_for({str(tiny_model())!r}, window="2k")
longctx.load_curriculum("tiny_16x", model={str(tiny_model())!r})
longctx.plan({str(tiny_model())!r}, curriculum="tiny_16x", ranks=2, hardware="cpu")
import longctx.planner.run
assert callable(longctx.plan)
print(json.dumps([first, [m for m in ("torch", "transformers") if m in sys.modules], rope[1], sorted(dir(longctx))]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    first, later, window, names = json.loads(done.stdout)
    assert (first, later, window) == ([], [], 2048)
    assert names == sorted(longctx.__all__)
    assert (Path(longctx.__file__).parent / "py.typed").exists()


def test_every_public_name_is_what_it_is_called():
    assert sorted(longctx._PUBLIC) == sorted(NAMES)
    for name in NAMES:
        assert getattr(longctx, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'ring'"):
        longctx.ring  # noqa: B018


# ---- two ranks: a training loop of somebody else's, and the ring of docs/attention.md


def batches() -> list[Tensor]:
    """STEPS batches of two sequences [2, SEQ_LEN] of a text's tokens."""
    ids = AutoTokenizer.from_pretrained(tiny_model())(TEXT, return_tensors="pt").input_ids[0]
    return list(ids[: STEPS * 2 * SEQ_LEN].view(STEPS, 2, SEQ_LEN))


def train(dtype: torch.dtype, *, sharded: bool = False) -> tuple[list[float], Tensor]:
    """A plain loop over all ranks of the world: the mean loss of each step, and one of the trained weights.

    sharded: by FSDP2 in place of DDP.
    """
    plain = AutoModelForCausalLM.from_pretrained(tiny_model(), dtype=dtype)
    longctx.set_rope(plain, *longctx.rope_for(plain, window=2048))
    cp = longctx.ContextParallel.from_world()
    model: Any = longctx.prepare(plain)
    if sharded:
        for layer in plain.model.layers:
            fully_shard(layer)
        fully_shard(model)
    elif cp.size > 1:
        model = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    losses = []
    for ids in batches():
        layout = cp.layout(SEQ_LEN, documents=[0, 61, SEQ_LEN])
        loss = model(**longctx.shard_batch(ids, layout)).loss_sum  # this rank's share of the mean, times the ranks
        loss.backward()  # DDP averages gradients over the ranks
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach().clone()
        if cp.size > 1:
            dist.all_reduce(mean)
        losses.append(mean.item() / cp.size)
    cp.close()
    weight = plain.model.layers[0].self_attn.q_proj.weight.detach()
    return losses, weight.full_tensor() if sharded else weight


def check_rank(rank: int, world: int, case: tuple[str, float, str]) -> None:
    """Train as one process did, whose figures the case's file holds; or run the ring of the page."""
    kind, tolerance, file = case
    if kind == "ring":
        check_ring(rank, Path(file).read_text(), tolerance)
        return
    if kind == "page":
        loss, alone = run_page(str(Path(file).parent), ranks=world), torch.load(file)
        dist.all_reduce(loss)
        assert abs(loss / world - alone) < tolerance
        return
    if kind == "dealt":
        model = longctx.prepare(AutoModelForCausalLM.from_pretrained(tiny_model()))
        layout = longctx.ContextParallel.from_world().layout(SEQ_LEN)
        told = r"2 ranks of this ContextParallel .* were given different batches"
        with pytest.raises(ValueError, match=told):
            model(**pickle.loads(pickle.dumps(longctx.shard_batch(batches()[rank], layout))))
        model(**longctx.shard_batch(batches()[0], layout))
        model.eval()  # whose loader is another one
        with pytest.raises(ValueError, match=told):
            model(**longctx.shard_batch(batches()[rank], layout))
        layout.cp.close()
        closed = layout.cp.layout(SEQ_LEN)
        with pytest.raises(ValueError, match="ContextParallel was closed; make another one"):
            longctx.context_attention(*[torch.zeros(1, 2, closed.local_len, 8)] * 3, closed)
        with pytest.raises(ValueError, match="closed and reaches no other rank; make another one"):
            closed.unshard(torch.zeros(closed.local_len), 0)
        return
    dtype = kind.removesuffix(" sharded")
    losses, weight = train(getattr(torch, dtype), sharded=dtype != kind)
    alone, alone_weight = torch.load(file)
    assert len(losses) == STEPS
    for ours, theirs in zip(losses, alone, strict=True):
        assert abs(ours - theirs) < tolerance, (losses, alone)
    assert (weight - alone_weight).abs().max() < tolerance


def run_page(folder: str, *, ranks: int) -> Tensor:
    """Run the training loop of docs/api.md in the current world; returns this rank's last loss."""
    code = re.search(r"A whole training loop.*?```python\n(.*?)```", (DOCS / "api.md").read_text(), re.S)
    assert code is not None
    text = code[1].replace("dist.init_process_group()\n", "")
    if ranks == 1:
        text = text.replace("torch.nn.parallel.DistributedDataParallel(", "(").replace("dist.get_rank()", "0")
    names: dict[str, Any] = {"MODEL": str(tiny_model()), "OUT": f"{folder}/trained-{ranks}", "batches": batches()}
    exec(compile(text, "docs/api.md", "exec"), names)
    return names["loss"].detach()


def check_ring(rank: int, page: str, tolerance: float) -> None:
    """out, dq, dk and dv of this rank beside dense attention; 62 tokens leave padding."""
    code = re.search(r"## The algorithm on one page.*?```python\n(.*?)```", page, re.S)
    assert code is not None
    assert code[1].count("\n", code[1].index("class FlatRing")) <= 64
    names: dict[str, Any] = {}
    exec(compile(code[1], "docs/attention.md", "exec"), names)
    x, ring = oracle(62, None, 8, 2), names["FlatRing"](62)
    indices = torch.from_numpy(ring.layout.indices(rank))
    real = indices >= 0
    q, k, v, dout = (torch.where(real[:, None], x[name][:, :, indices], 0.0) for name in ("q", "k", "v", "dout"))
    out, lse = ring.forward(q, k, v)
    found = {"out": out, **dict(zip(("dq", "dk", "dv"), ring.backward(dout, q, k, v, out, lse), strict=True))}
    for name, got in found.items():
        assert (got[:, :, real] - x[name][:, :, indices[real]]).abs().max() < tolerance, name


@pytest.fixture(scope="module")
def on_two_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str] | None]:
    """The failure of each case on two ranks, None where it passed. The ranks are started once."""
    folder = tmp_path_factory.mktemp("two_ranks")
    torch.save(run_page(str(folder), ranks=1), folder / "page")
    cases = [("ring", 1e-10, str(DOCS / "attention.md")), ("page", 1e-6, str(folder / "page")), ("dealt", 0.0, "")]
    for kind, tolerance in (("float32", 1e-6), ("float64", 1e-10)):
        losses, weight = train(getattr(torch, kind))
        assert losses[-1] < losses[0] - 0.01
        torch.save((losses, weight), folder / kind)
        cases += [(name, tolerance, str(folder / kind)) for name in (kind, f"{kind} sharded")]
    failures = run_ranks(2, check_rank, cases, folder / "store")
    return {case[0]: failures.get(case) for case in cases}


@pytest.mark.parametrize("case", ["float32", "float64", "float32 sharded", "float64 sharded"])
def test_a_plain_loop_on_two_ranks_trains_as_one_process_does(on_two_ranks: dict[str, Any], case: str):
    """Under DDP, and under FSDP2 (fully_shard)."""
    assert on_two_ranks[case] is None


def test_the_training_loop_of_the_page_runs_on_two_ranks(on_two_ranks: dict[str, Any]):
    assert on_two_ranks["page"] is None


def test_ranks_that_share_sequences_and_read_different_ones_are_told(on_two_ranks: dict[str, Any]):
    """As Trainer's and accelerate's loaders would deal them out."""
    assert on_two_ranks["dealt"] is None


def test_the_ring_of_the_attention_page_equals_dense_attention(on_two_ranks: dict[str, Any]):
    assert on_two_ranks["ring"] is None


# ---- beside transformers, accelerate and Trainer


def test_a_prepared_model_has_the_loss_and_gradients_of_transformers():
    """Also, no mask of S x S is made, although the model was loaded with transformers' own attention."""
    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_pretrained(tiny_model(), dtype=torch.float64, attn_implementation="eager")
    ids = batches()[0]
    labels = ids.clone()
    labels[:, :10] = -100
    theirs = plain(input_ids=ids, labels=labels).loss
    theirs.backward()
    expected = {name: weight.grad.clone() for name, weight in plain.named_parameters()}
    plain.zero_grad()
    model = longctx.prepare(plain, ffn_block=0, activation_checkpointing=False)
    layout = longctx.ContextParallel.from_world().layout(SEQ_LEN)
    seen: list[Any] = []
    plain.model.layers[0].register_forward_pre_hook(
        lambda _m, _a, kw: seen.append(kw["attention_mask"]), with_kwargs=True
    )
    ours = model(**longctx.shard_batch(ids, layout, labels)).loss_sum
    ours.backward()
    assert seen[0].numel() == 0
    assert abs(ours.item() - theirs.item()) < 1e-6  # transformers' norms and loss are fp32 in places
    for name, weight in plain.named_parameters():
        assert (weight.grad - expected[name]).norm() < 1e-5 * expected[name].norm().clamp_min(1e-3), name
    said = plain.generate(ids[:1, :8], max_new_tokens=2, do_sample=False, pad_token_id=1)
    assert said.shape == (1, 10)  # the model's own forward still serves


def test_a_prepared_model_takes_the_block_sizes_of_its_device():
    """Resolved at the forward pass, because a model may move after `prepare`."""
    plain = AutoModelForCausalLM.from_pretrained(tiny_model())
    layout = longctx.ContextParallel.from_world().layout(SEQ_LEN)
    for options, block in (({}, 2048), ({"ffn_block": 16}, 16)):
        model = longctx.prepare(plain, **options)
        model(**longctx.shard_batch(batches()[0], layout))
        assert {layer.save_policy.block for layer in plain.model.layers} == {block}


def test_accelerate_and_trainer_take_a_prepared_model(tmp_path: Path):
    """The same first loss as the plain loop's, and weights that move."""
    from accelerate import Accelerator
    from transformers import Trainer, TrainingArguments

    layout = longctx.ContextParallel.from_world().layout(SEQ_LEN)

    def collate(rows: list[dict[str, list[int]]]) -> dict[str, Any]:
        return longctx.shard_batch(torch.tensor([row["input_ids"] for row in rows]), layout)

    rows = [{"input_ids": row} for ids in batches() for row in ids.tolist()]
    model = longctx.prepare(AutoModelForCausalLM.from_pretrained(tiny_model()))
    expected = model(**collate(rows[:2])).loss_sum.item()
    accelerator = Accelerator(cpu=True)
    wrapped, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=1e-3))
    loss = wrapped(**collate(rows[:2])).loss_sum
    accelerator.backward(loss)
    optimizer.step()
    assert loss.item() == pytest.approx(expected, abs=1e-6)
    assert model(**collate(rows[:2])).loss_sum.item() < expected

    for bf16, bar in ((False, 1e-5), (True, 1e-2)):  # bf16: fp32 weights under torch.autocast
        model = longctx.prepare(AutoModelForCausalLM.from_pretrained(tiny_model()))
        arguments = TrainingArguments(
            output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=2, logging_steps=1, save_strategy="no",
            report_to=[], remove_unused_columns=False, use_cpu=True, train_sampling_strategy="sequential",
            disable_tqdm=True, bf16=bf16,
        )  # fmt: skip
        trainer = Trainer(model=model, args=arguments, train_dataset=rows, data_collator=collate)  # type: ignore[arg-type]
        found = trainer.train().training_loss
        assert found == pytest.approx(expected, abs=bar)
        assert (abs(found - expected) > 1e-5) == bf16


def test_trainer_checkpoints_continues_and_evaluates_a_model_with_tied_embeddings(tmp_path: Path):
    """safetensors refuses two names of one weight. The batches come from a loader's worker, layout included."""
    from transformers import Trainer, TrainingArguments

    layout = longctx.ContextParallel.from_world().layout(SEQ_LEN)

    def collate(rows: list[list[int]]) -> dict[str, Any]:
        return longctx.shard_batch(torch.tensor(rows), layout)

    def trainer(steps: int) -> Any:
        torch.manual_seed(0)
        shape: dict[str, Any] = {"vocab_size": 512, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
        plain = Qwen2ForCausalLM(
            Qwen2Config(**shape, num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True)
        )
        model = longctx.prepare(plain, activation_checkpointing=False)
        arguments = TrainingArguments(
            output_dir=str(tmp_path), max_steps=steps, save_steps=1, per_device_train_batch_size=2, report_to=[],
            remove_unused_columns=False, use_cpu=True, disable_tqdm=True, gradient_checkpointing=True,
            lr_scheduler_type="constant", dataloader_num_workers=1, neftune_noise_alpha=0.1, data_seed=0,
        )  # fmt: skip
        rows = [row for ids in batches() for row in ids.tolist()]
        return Trainer(model=model, args=arguments, train_dataset=rows, eval_dataset=rows, data_collator=collate)  # type: ignore[arg-type]

    one = trainer(1)
    one.train()
    assert one.model.memory.activation_checkpointing
    two = trainer(2)
    before = two.evaluate()["eval_loss"]
    two.train(resume_from_checkpoint=True)
    assert two.state.global_step == 2
    assert two.evaluate()["eval_loss"] < one.evaluate()["eval_loss"] < before
    head, embedding = two.model.model.lm_head.weight, two.model.model.model.embed_tokens.weight
    assert head is embedding


def test_a_prepared_model_is_pickled_copied_and_passed_over_by_torch_compile(tmp_path: Path):
    """The file is read by a process that has prepared no model of this family."""
    model = longctx.prepare(AutoModelForCausalLM.from_pretrained(tiny_model()))
    layout = longctx.ContextParallel.from_world().layout(SEQ_LEN)
    batch = longctx.shard_batch(batches()[0], layout)
    expected = model(**batch).loss_sum.item()
    torch.save(model, tmp_path / "model")
    code = (
        "import longctx, sys, torch; model = torch.load(sys.argv[1], weights_only=False); "
        "batch = torch.load(sys.argv[2], weights_only=False); print(float(model(**batch).loss_sum.detach()))"
    )
    torch.save({name: value for name, value in batch.items() if name != "layout"}, tmp_path / "batch")
    done = warm.python("-c", code, str(tmp_path / "model"), str(tmp_path / "batch"))
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == expected
    assert copy.deepcopy(model)(**batch).loss_sum.item() == expected

    compiled = torch.compile(model)
    loss = compiled(**batch).loss_sum
    loss.backward()
    assert loss.item() == expected
    assert all(weight.grad is not None for weight in model.parameters())


def test_a_prepared_model_stands_for_its_transformers_model_in_every_function():
    model = longctx.prepare(AutoModelForCausalLM.from_pretrained(tiny_model()))
    longctx.set_rope(model, *longctx.rope_for(model, window="1k"))
    assert model.model.config.max_position_embeddings == 1024
    tokenizer = AutoTokenizer.from_pretrained(tiny_model())
    assert longctx.needle_grid(model, tokenizer, lengths=[384], text=TEXT, per_cell=1).window == 1024
    with pytest.raises(UserError, match="prepared already"):
        longctx.prepare(model)


def test_a_gemma_norm_that_fsdp2_has_given_a_class_of_its_own_is_one_still():
    """fully_shard([model.norm, model.lm_head]) does so; Gemma's weight is an offset from 1, and its epsilon `eps`."""
    from transformers import GemmaConfig, GemmaForCausalLM

    shape: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    torch.manual_seed(0)
    plain: Any = GemmaForCausalLM(GemmaConfig(**shape, num_attention_heads=2, num_key_value_heads=1, head_dim=16))
    model = longctx.prepare(plain)
    layout = longctx.ContextParallel.from_world().layout(SEQ_LEN)
    batch = longctx.shard_batch(torch.arange(SEQ_LEN)[None] % 64, layout)
    expected = model(**batch).loss_sum.item()
    kind = type(plain.model.norm)
    plain.model.norm.__class__ = type(f"FSDP{kind.__name__}", (kind,), {})  # as torch does
    assert model(**batch).loss_sum.item() == expected


def test_only_the_loss_is_in_the_graph_and_ids_may_be_narrow():
    model = longctx.prepare(base())
    layout = longctx.ContextParallel.from_world().layout(SEQ_LEN)
    batch = longctx.shard_batch(batches()[0].int(), layout)
    out = model(**batch, per_token=True, logits_at=torch.tensor([3, 5]))
    assert [name for name, value in out._asdict().items() if value.requires_grad] == ["loss_sum"]
    assert out.logits.shape[0] == 2


def test_the_needles_of_a_prompt_tuned_model_are_read_where_they_are():
    """peft puts its virtual tokens before the prompt, so that places count from the end."""
    from peft import PromptTuningConfig, get_peft_model

    plain, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_model()), AutoTokenizer.from_pretrained(tiny_model())
    tuned: Any = get_peft_model(plain, PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))
    line_end = tokenizer("\n").input_ids[-1]
    with torch.no_grad():
        prompt = tuned.prompt_encoder["default"].embedding.weight
        prompt.copy_(plain.get_input_embeddings().weight[[line_end, line_end]])
    few: dict[str, Any] = {"lengths": [384], "text": TEXT, "per_cell": 2}
    tuned.train()
    plain.model.layers[0].eval()  # each module keeps its own mode
    modes = [module.training for module in tuned.modules()]
    assert longctx.needle_grid(plain, tokenizer, **few).pooled == 1.0
    assert [module.training for module in tuned.modules()] == modes
    assert longctx.needle_grid(tuned, tokenizer, **few).pooled == 1.0


# ---- from a theta to a needle grid, in one notebook


def test_a_notebook_extends_a_model_of_another_family(tmp_path: Path):
    llama = AutoModelForCausalLM.from_pretrained(tiny_model())
    shape = {k: v for k, v in llama.config.to_dict().items() if k not in ("model_type", "architectures", "head_dim")}
    plain = Qwen2ForCausalLM(Qwen2Config(**shape))
    state = {name: torch.zeros_like(weight) for name, weight in plain.state_dict().items()}
    plain.load_state_dict({**state, **llama.state_dict()})
    tokenizer = AutoTokenizer.from_pretrained(tiny_model())
    base, tuned, merged = (str(tmp_path / name) for name in ("base", "tuned", "merged"))
    plain.save_pretrained(base)
    tokenizer.save_pretrained(base)

    rope, window = longctx.rope_for(base, window="1k")
    assert (rope["rope_theta"], window) == (longctx.rope_for(plain, window=1024)[0]["rope_theta"], 1024)
    longctx.set_rope(plain, rope, window)
    model = longctx.prepare(plain)
    layout = longctx.ContextParallel.from_world().layout(window)
    ids = tokenizer(TEXT, return_tensors="pt").input_ids[:, :window]
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    before = model(**longctx.shard_batch(ids, layout)).loss_sum
    before.backward()
    optimizer.step()
    assert model(**longctx.shard_batch(ids, layout)).loss_sum < before
    plain.save_pretrained(tuned)

    adapter = longctx.extract_lora(base, tuned, tmp_path / "adapter", rank=64)
    done = longctx.merge_lora(base, adapter.out, merged)
    assert (done.window, done.rope["rope_theta"]) == (window, rope["rope_theta"])
    again = AutoModelForCausalLM.from_pretrained(merged)
    assert again.config.model_type == "qwen2"
    few: dict[str, Any] = {"lengths": [384], "text": TEXT, "per_cell": 2}
    found = longctx.needle_grid(again, tokenizer, **few)
    assert found.window == window
    assert found.to_dict()["found"] == longctx.needle_grid(plain, tokenizer, **few).to_dict()["found"]


# ---- a curriculum of one's own

OWN = """
rule: yarn
lr: {peak: 1e-4}
stages:
  first: {seq_len: 1k, tokens: 8k, batch: 2}
  second: {seq_len: 4k, steps: 3, batch: 1, rule: {name: dynamic-ntk, factor: 2}, lr: {peak: 5e-5}}
"""


def test_a_curriculum_of_ones_own_is_resolved_from_its_file(tmp_path: Path):
    file = tmp_path / "own.yaml"
    file.write_text(OWN)
    first, second = longctx.load_curriculum(file, model=tiny_model(), rule="scaling-law")
    assert (first.seq_len, first.steps, first.lr.at(0), first.rule) == (1024, 4, 1e-4, "scaling-law")
    assert (second.seq_len, second.steps, second.lr.at(2), second.start_window) == (4096, 3, 5e-5, 1024)
    assert second.theta == longctx.rope_for({**LLAMA, "rope_theta": first.theta, "max_position_embeddings": 1024,
                                             "hidden_size": 128}, window="4k", factor=2)[0]["rope_theta"]  # fmt: skip
    (alone,) = longctx.load_curriculum(file, model=tiny_model(), only=["first"])
    assert alone.rope["rope_type"] == "yarn"
    file.write_text("defaults: [tiny_16x, _self_]\nstages: {s64k: {seq_len: 64k, steps: 1, batch: 1}}\n")
    with pytest.raises(UserError, match=r"defaults .*own\.yaml"):
        longctx.load_curriculum(file, model=tiny_model())
    file.write_text("stages: {s64k: [")
    with pytest.raises(UserError, match=r"own\.yaml, line 1 is not valid YAML"):
        longctx.load_curriculum(file, model=tiny_model())


# ---- mistakes

LLAMA = {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "rope_theta": 1e4,
         "max_position_embeddings": 512}  # fmt: skip


def tiny_batch(**changes: Any) -> Any:
    layout = longctx.ContextParallel.from_world().layout(8)
    return longctx.shard_batch(**{"input_ids": torch.zeros(1, 8, dtype=torch.long), "layout": layout, **changes})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: longctx.rope_for(LLAMA, window=256), "window=256 is shorter than the model's window of 512"),
        (lambda: longctx.rope_for(LLAMA, window="8q"), "window='8q' is not a length; write 8192, 64k or 1M"),
        (lambda: longctx.rope_for(LLAMA, window=1024, rule="yam"), "rule='yam' is not a rule; did you mean 'yarn'"),
        (lambda: longctx.rope_for(LLAMA, window=1024, rule=0.5), "rule=0.5 as a number is the theta"),
        (lambda: longctx.rope_for(LLAMA, window=1024, rule="ntk", factor=2), "factor=2 does not belong to rule 'ntk'"),
        (lambda: longctx.rope_for(3, window=1024), "int is not a model"),
        (lambda: longctx.rope_for("no/such/folder", window=1024), "no/such/folder"),
        (lambda: longctx.set_rope(nn.Linear(2, 2), {"rope_theta": 1e4}, 512), "not a causal language model"),
        (lambda: longctx.set_rope(nn.Linear(2, 2), {}, 512), "not a mapping with rope_theta"),
        (lambda: longctx.set_rope(nn.Linear(2, 2), {"rope_theta": 1e4}, 1), "window=1 is too short"),
        (lambda: longctx.prepare(nn.Linear(2, 2)), "model is a Linear, not a causal language model"),
        (lambda: tiny_batch(labels=torch.full((1, 8), -100)), "no token of the batch has a label"),
        (lambda: tiny_batch(input_ids=torch.zeros(1, 9)), r"input_ids has shape \(1, 9\), and it must be \[batch, 8\]"),
        (lambda: tiny_batch(layout=8), "layout is a int; pass what"),
        (lambda: tiny_batch(reduction="max"), "reduction='max' is not sum or mean"),
        (lambda: longctx.load_curriculum("tiny_61x", model=LLAMA), "did you mean 'tiny_16x'"),
        (lambda: longctx.load_curriculum("my.yaml", model=LLAMA), "my.yaml does not exist"),
        (lambda: longctx.load_curriculum("tiny_16x", model=LLAMA, ony=[]), "ony is not a known key"),
        (lambda: longctx.load_curriculum("tiny_16x", model=LLAMA, only=["s99"]), "s99"),
        (lambda: longctx.plan(LLAMA), "model=dict is not a folder or hub id"),  # type: ignore[arg-type]
        (lambda: longctx.plan(tiny_model(), curriculum="nothing"), "nothing"),
        (lambda: longctx.plan(tiny_model(), ranks=0), "ranks=0 must be 1 or more"),
        (lambda: longctx.plan(tiny_model(), overrides=["engin=deepspeed"]), "engin"),
        (lambda: longctx.plan(tiny_model(), overrides="engine=ddp"), r"give a list of words, such as \['engine=ddp'\]"),
        (lambda: longctx.plan(tiny_model(), overrides=["--config-dir", "no/such"]), "no/such is not a folder"),
        (lambda: longctx.plan(tiny_model(), overrides=["--cfg"]), "overrides are key=value and --config-dir FOLDER"),
        (lambda: longctx.plan(tiny_model(), curriculum="my/curriculum/mine.yaml"),
         "my/curriculum/mine.yaml is not a choice: .*--config-dir FOLDER curriculum=mine"),
        (lambda: longctx.extract_lora("no/such/base", tiny_model(), "out", rank=0), "rank"),
        (lambda: longctx.extract_lora("no/such/base", tiny_model(), "out", ranke=2), "ranke is not a known key"),
        (lambda: longctx.merge_lora(tiny_model(), "no/such/adapter", "out"), "no/such/adapter"),
        (lambda: longctx.extract_lora(base(), tiny_model(), "out"), "base is a LlamaForCausalLM and not a folder"),
        (lambda: longctx.merge_lora(tiny_model(), base(), "out"), "adapter is a LlamaForCausalLM and not a folder"),
    ],
)  # fmt: skip
def test_a_mistake_is_a_value_error_in_words(call: Any, message: str):
    with pytest.raises(ValueError, match=message) as refusal:
        call()
    assert isinstance(refusal.value, UserError)
    assert not Path("out").exists()


def test_plan_takes_a_curriculum_of_ones_own_like_the_command_line(tmp_path: Path):
    (tmp_path / "curriculum").mkdir()
    text = "rule: dynamic-ntk\nlr: {peak: 1.0e-5}\nstages: {s1k: {seq_len: 1k, steps: 2, batch: 8}}\n"
    (tmp_path / "curriculum" / "mine.yaml").write_text(text)
    own = ["--config-dir", str(tmp_path)]
    for curriculum, words in (("mine", own), ("tiny_16x", [*own, "curriculum=mine"])):
        plan = longctx.plan(tiny_model(), curriculum=curriculum, ranks=2, hardware="cpu", overrides=words)
        assert list(plan["stages"]) == ["s1k"]


NO_NUMBER = [-1, 0.5, math.nan, math.inf, 1e99, 2**63, "", "abc", True]


@pytest.mark.parametrize(
    ("call", "name", "values"),
    [
        (lambda x: longctx.rope_for(LLAMA, window=x), "window=", NO_NUMBER),
        (lambda x: longctx.rope_for(LLAMA, window="64k", rule=x), "rule=|theta=", NO_NUMBER),
        (lambda x: longctx.rope_for(LLAMA, window="64k", factor=x), "rule.factor=", NO_NUMBER),
        (lambda x: longctx.rope_for({**LLAMA, "rope_theta": x}, window="64k"), "rope_theta=",
         [*NO_NUMBER, torch.ones(1)]),
        (lambda x: longctx.prepare(base(), z_loss=x), "prepare: z_loss=",
         [-1, math.nan, math.inf, 1e99, "", "abc", True]),
        (lambda x: longctx.prepare(base(), keep_matmuls=x), "keep_matmuls=", NO_NUMBER),
        (lambda x: longctx.ContextParallel.from_world(nodes=x), "nodes=", [0, *NO_NUMBER]),
        (lambda x: longctx.ContextParallel.from_world(schedule="ulysses_ring", ulysses=x), "ulysses=", [0, *NO_NUMBER]),
        (lambda x: longctx.ContextParallel.from_world(timeout=x), "timeout=", [0, -1, math.nan, math.inf, 1e99, "abc"]),
        (lambda x: longctx.ContextParallel.from_world().layout(seq_len=x), "seq_len=", [0, None, *NO_NUMBER]),
        (lambda x: longctx.context_attention(*[torch.ones(1, 2, 8, 4)] * 3, layout_of_8(), scale=x), "scale=",
         [-1, 0, math.nan, math.inf, 1e99]),
        (lambda x: longctx.shard_batch(x, layout_of_8()), "shard_batch: input_ids is a", [3, None, [1, 2]]),
        (lambda x: tiny_batch(weights=x), "weights", [3, torch.full((1, 8), math.inf), torch.full((1, 8), math.nan)]),
        (lambda x: longctx.load_curriculum("tiny_16x", model=LLAMA, only=x), "only=", [3, "s2048"]),
        (lambda x: longctx.plan(tiny_model(), ranks=x), "ranks=", [-1, 1e99, True]),
        (lambda x: longctx.extract_lora("a", "b", "out", rank=x), "rank=", [0, *NO_NUMBER]),
        (lambda x: longctx.merge_lora("a", "b", "out", scale=x), "scale.0=", [math.nan, math.inf, 1e99, "abc", True]),
    ],
)  # fmt: skip
def test_a_number_with_which_nothing_computes_is_a_value_error_in_words(call: Any, name: str, values: list[Any]):
    for value in values:
        with pytest.raises(ValueError, match=name):
            call(value)


@cache
def layout_of_8() -> longctx.Layout:
    return longctx.ContextParallel.from_world().layout(seq_len=8)


@cache
def base() -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_model())


def test_a_rope_with_numbers_that_transformers_cannot_take_is_refused():
    for rope in (
        {"rope_theta": math.nan},
        {"rope_theta": 1e30},
        {"rope_theta": 1e4, "rope_type": "yarn", "factor": 1e99},
    ):
        with pytest.raises(UserError, match=r"is not a (positive )?number"):
            longctx.set_rope(base(), {"rope_type": "default", **rope}, 1024)


def test_options_that_contradict_each_other_are_refused():
    plain = AutoModelForCausalLM.from_pretrained(tiny_model())
    with pytest.raises(UserError, match="keep_matmuls and offload_activations do not apply"):
        longctx.prepare(plain, activation_checkpointing=False, offload_activations=True)
    with pytest.raises(UserError, match="loss_chunk=0 must be 1 or more"):
        longctx.prepare(plain, loss_chunk=0)
    with pytest.raises(UserError, match=r"fused='fast' is not one of 'auto', 'off' or 'liger'"):
        longctx.prepare(plain, fused="fast")  # type: ignore[arg-type]


def test_a_family_that_is_not_trained_is_named():
    from transformers import GPT2Config, GPT2LMHeadModel

    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_positions=8, n_embd=4, n_layer=1, n_head=1))
    with pytest.raises(UserError, match="is a 'gpt2' model, and longctx trains llama"):
        longctx.prepare(gpt2)
