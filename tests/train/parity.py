"""Loss and every gradient of one optimizer step on ranks, against transformers in one process, document by
document.

The reference knows nothing of packing, rings or engines: each document alone through a plain fp64
transformers model, its token losses weighted and summed, divided by the sum of all weights.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from longctx.config.model import InitConfig, MemoryConfig
from longctx.config.train import EngineConfig, GuardsConfig, OptimConfig
from longctx.decide import Decision, Shares
from longctx.distributed.ranks import Ranks
from longctx.model import LossModel, init_from
from longctx.train import engine as engines
from longctx.train.batch import micro_batch
from longctx.train.guards import Guards
from longctx.train.heartbeat import Progress
from longctx.train.open_stage import open_context_parallel
from longctx.train.step import Stepper, Timer
from tests.watch import Watch

from .made import VOCAB, MadeData

SEQ = 48
SHAPE = InitConfig(layers=2, hidden=32, heads=4, kv_heads=2, ffn=48, vocab=VOCAB, window=64, seed=7)


@dataclass(frozen=True)
class Case:
    """variant: plain; mute (the first rank's tokens carry no label); frozen (embedding); lora (adapter
    only).
    """

    cp: int
    zero: int = 0
    accumulation: int = 1
    dtype: str = "float32"
    variant: str = "plain"
    rows: int = 1
    layout: str = "zigzag"
    length: int = SEQ
    full: bool = False  # full recomputation


def device() -> torch.device:
    """The device of a rank: the card of the NCCL ranks that tests/gpu starts, or the CPU."""
    return torch.device("cuda", 0) if "nccl" in str(dist.get_backend_config()) else torch.device("cpu")


def flat(cp: int, world: int) -> Decision:
    """A flat ring of cp ranks within one node."""
    return Decision(cp, world // cp, 1, "flat_ring", 1, per_group=1, per_forward=1)


def made_model(case: Case, dtype: str, attention: str) -> Any:
    model = init_from(SHAPE, dtype=dtype, attention=attention)  # made in its type: fp64 models have fp64 norms
    model.load_state_dict(init_from(SHAPE).state_dict())  # drawn in fp32, or fp64 would draw other numbers
    if case.variant == "lora":
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(11)
        model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"]))
        for name, parameter in model.named_parameters():
            if "lora_" in name:  # B starts as zero, which would hide A's gradient; drawn in fp32 whatever the type
                parameter.data.copy_(0.05 * torch.randn(parameter.shape, dtype=torch.float32))
    model = model.to(getattr(torch, dtype))
    if case.variant == "frozen":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("embed_tokens" not in name)
    return model


def reference(case: Case, data: MadeData) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients in one process and fp64, on the device of the ranks, whose fp32 cosines differ by device."""
    place = device()
    model = made_model(case, "float64", "sdpa").to(place)  # eager would take its softmax in fp32
    total, weight = torch.zeros((), dtype=torch.float64, device=place), 0.0
    for index in range(len(data)):
        tokens = torch.from_numpy(data.tokens_of[index]).to(place)
        weights = torch.from_numpy(data.weights_of[index]).double().to(place)
        bounds = data.bounds_of[index]
        for low, high in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
            if high - low < 2:
                continue
            logits = model(input_ids=tokens[None, low:high], use_cache=False).logits[0, :-1]
            nll = torch.nn.functional.cross_entropy(logits, tokens[low + 1 : high], reduction="none")
            total = total + (nll * weights[low + 1 : high]).sum()
            weight += float(weights[low + 1 : high].sum())
    (total / weight).backward()
    grads = {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}
    return float(total.detach() / weight), grads


def check(rank: int, world: int, case: Case) -> None:
    """Assert that one step of `case` on this rank equals the reference; the error names the parameter."""
    ranks = Ranks(rank, world, rank, world, device())
    dp = world // case.cp
    per_rank = case.rows * case.accumulation
    mute = tuple(range(per_rank)) if case.variant == "mute" and dp > 1 else ()
    data = MadeData(case.length, dp * per_rank, seed=world, mute=mute)
    if case.variant == "mute" and dp == 1:  # the first rank's two chunks of every sequence, under zigzag
        chunk = SEQ // (2 * case.cp)
        for weights in data.weights_of:
            weights[: chunk + 1] = 0.0  # the last of them predicts the token after the chunk
            weights[SEQ - chunk :] = 0.0
    share = Shares(dp, rank // case.cp, per_rank, case.rows)
    context, group = open_context_parallel(flat(case.cp, world), ranks, None)
    loss, wanted = reference(case, data)
    with gradients(case, ranks) as (engine, grads):
        window = [micro_batch(data, own, context, case.layout) for own in share.sequences(0)]
        stepper = Stepper(engine, ranks, Guards(GuardsConfig(), Path("."), ranks, []), Progress(), case.cp)
        report = stepper.take(window, 0.0, step=0, timer=Timer(ranks.device))
        tight = case.dtype == "float64"
        assert abs(report.loss - loss) <= (1e-12 if tight else 1e-6) * loss, f"loss {report.loss} against {loss}"
        assert grads.keys() == wanted.keys(), grads.keys() ^ wanted.keys()
        for name, grad in wanted.items():
            error = float((grads[name].cpu().double() - grad).norm() / grad.norm().clamp_min(1e-30))
            assert error <= (1e-10 if tight else 1e-5), f"{name}: gradient off by {error:.2e}"
        with torch.no_grad():
            sums = [float(engine.forward(**batch.to(ranks.device).inputs).nll_sum) for batch in window]
        evaluated = ranks.sum([sum(sums)])[0] / report.weight
        assert abs(evaluated - loss) <= (1e-12 if tight else 1e-6) * loss, f"evaluation {evaluated} against {loss}"
        norm = float(torch.stack([grad.norm() for grad in wanted.values()]).norm())
        assert abs(report.grad_norm - norm) <= 1e-5 * norm, f"norm {report.grad_norm} against {norm}"
    context.close()
    if group is not None:
        dist.destroy_process_group(group)


def check_isolation(rank: int, world: int, case: Case) -> None:
    """Changing one document of a packed sequence leaves every other document's token losses as they were,
    bit for bit.
    """
    ranks = Ranks(rank, world, rank, world, device())
    context, _ = open_context_parallel(flat(case.cp, world), ranks, None)
    model = LossModel(made_model(case, case.dtype, "longctx"), MemoryConfig())
    data = MadeData(SEQ, 4, seed=3)
    low, high = data.bounds_of[2][1:3]
    losses = []
    for _ in range(2):
        batch = micro_batch(data, [2], context, case.layout)
        with torch.no_grad():
            losses.append(model(**batch.inputs, per_token=True).per_token[0])
        data.tokens_of[2][low:high] = (data.tokens_of[2][low:high] + 17) % VOCAB
    held = batch.inputs["layout"].indices
    inside = (held >= low) & (held < high)
    assert torch.equal(losses[0][~inside], losses[1][~inside])
    assert ranks.any(bool((losses[0][inside] != losses[1][inside]).any()))
    context.close()


def check_attention_once(rank: int, world: int, case: Case) -> None:
    """Assert that each layer's attention runs once forward and once backward per micro-batch, with checkpointing."""
    ranks = Ranks(rank, world, rank, world, device())
    context, _ = open_context_parallel(flat(case.cp, world), ranks, None)
    data = MadeData(SEQ, case.accumulation * world // case.cp, seed=3)
    share = Shares(world // case.cp, rank // case.cp, case.accumulation, 1)
    with gradients(case, ranks) as (engine, _):
        stepper = Stepper(engine, ranks, Guards(GuardsConfig(), Path("."), ranks, []), Progress(), case.cp)
        for step in range(2):  # ZeRO-3 records its trace in the first and follows it in the second
            window = [micro_batch(data, own, context, case.layout) for own in share.sequences(0)]
            with Watch() as watch:
                stepper.take(window, 0.0, step=step, timer=Timer(ranks.device))
            wanted = SHAPE.layers * case.accumulation
            assert watch.calls["longctx.context_attention.default"] == wanted, watch.calls
            assert watch.calls["longctx.context_attention_backward.default"] == wanted, watch.calls
    context.close()


@contextmanager
def gradients(case: Case, ranks: Ranks) -> Any:
    """An engine for the case, and the dict its full averaged gradients are put into when the step is
    taken.
    """
    made = made_model(case, case.dtype, "longctx").to(ranks.device)
    model = LossModel(made, MemoryConfig(ffn_block=16, loss_chunk=8, keep_attention=not case.full))
    place: Any = ranks.device.type
    config = EngineConfig(name="deepspeed" if case.zero else "ddp", zero=case.zero, device=place)
    engine: Any = engines.build(config, OptimConfig(max_grad_norm=0.0), model, ranks)
    grads: dict[str, torch.Tensor] = {}

    def instead_of_a_step(lr: float, norm: float) -> None:
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                grads[name.removeprefix("model.")] = full_gradient(case, parameter).clone()
        engine.discard()

    engine.step = instead_of_a_step
    try:
        yield engine, grads
    finally:
        engine.close()


def full_gradient(case: Case, parameter: torch.Tensor) -> torch.Tensor:
    if not case.zero:
        assert parameter.grad is not None
        return parameter.grad
    from deepspeed.utils import safe_get_full_grad

    return safe_get_full_grad(parameter)
