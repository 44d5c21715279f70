"""One trial of `longctx bench longest`: a training step of one length, in a process of its own.

The step is training's: model, engine, context-parallel attention and `Stepper` are made by the same functions, and only
the tokens are random. A short step comes first; it makes the optimizer's states. Memory is the device allocator's on a
GPU, and on a CPU the resident set above what interpreter and libraries take.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from longctx.bench.longest_plan import training_config
from longctx.config.base import build
from longctx.config.bench_longest import BenchLongestConfig
from longctx.config.model import InitConfig
from longctx.decide import Machines, decide
from longctx.errors import first_line, out_of_memory
from longctx.host_memory import peak_resident, process_bytes
from longctx.planner.remedies import GIB
from longctx.processes import die_with_parent
from longctx.train.step import Timer

WARM_UP = 256  # tokens of the first step


@dataclass(frozen=True)
class RandomTokens:
    """Sequences of random tokens, each one document, in the place of data.StageData."""

    seq_len: int
    vocab: int

    def boundaries(self, index: int) -> np.ndarray:
        return np.array([0, self.seq_len])

    def documents(self, index: int) -> tuple[str, ...]:
        return ("random tokens",)

    def local(self, index: int, positions: np.ndarray) -> Any:
        from types import SimpleNamespace

        tokens = np.random.default_rng(index).integers(0, self.vocab, self.seq_len + 1)
        last = positions == self.seq_len - 1
        labels = np.where(last, -100, tokens[positions + 1])
        return SimpleNamespace(tokens=tokens[positions], labels=labels, weights=np.where(last, 0.0, 1.0).astype("f4"))


class Meter(Timer):
    """A timer that also notes the most memory of each phase, in GiB."""

    def __init__(self, device: torch.device) -> None:
        self.base = process_bytes("VmRSS") if device.type == "cpu" else 0.0
        self.peaks: dict[str, float] = {}
        super().__init__(device)

    def start(self) -> None:
        super().start()
        self.peaks = {name: peak for name, peak in self.peaks.items() if name in ("model", "engine")}
        self.forget()

    def lap(self, phase: str) -> None:
        super().lap(phase)
        self.note(phase)

    def note(self, phase: str) -> None:
        """Note the peak since the last note under this name."""
        self.peaks[phase] = max(self.peaks.get(phase, 0.0), (self.peak() - self.base) / GIB)
        self.forget()

    def peak(self) -> float:
        """The most bytes held since `forget`."""
        return float(torch.cuda.max_memory_allocated()) if self.device.type == "cuda" else peak_resident()

    def forget(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def main(path: str) -> None:
    die_with_parent()
    request = json.loads(Path(path).read_text(encoding="utf-8"))
    config = build(BenchLongestConfig, request["config"], origin="bench longest")
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    doing = ["loading the model"]
    try:
        result: dict[str, Any] = {"fits": True, **measure(config, request["seq_len"], request["device"], doing)}
    except Exception as error:
        if not out_of_memory(error):
            raise
        first = first_line(error)
        result = {"fits": False, "why": f"{doing[0]}: {first[:300]}"}
    Path(request["result"]).write_text(json.dumps(result), encoding="utf-8")


def limit_memory(config: BenchLongestConfig, device: str) -> None:
    """Hold this process to memory_gib: its private writable memory on a CPU, its tensors on a GPU."""
    if config.memory_gib is None:
        return
    size = config.memory_gib * GIB
    if device == "cuda":
        torch.cuda.set_per_process_memory_fraction(min(1.0, size / torch.cuda.mem_get_info(0)[1]))
    else:  # RLIMIT_AS would also count libraries and address space that is only reserved
        resource.setrlimit(resource.RLIMIT_DATA, (int(size), resource.getrlimit(resource.RLIMIT_DATA)[1]))


def measure(config: BenchLongestConfig, seq_len: int, device: str, doing: list[str]) -> dict[str, Any]:
    """Take the step; returns its seconds, its peak and the peak of each phase. doing: set to what is done just now."""
    from longctx.config.train import GuardsConfig
    from longctx.distributed import ranks as worlds
    from longctx.model import LossModel, init_from, set_rope
    from longctx.shape import shape_of_model
    from longctx.train import engine as engines
    from longctx.train.batch import micro_batch
    from longctx.train.guards import Guards
    from longctx.train.heartbeat import Progress
    from longctx.train.open_stage import open_context_parallel
    from longctx.train.step import Stepper
    from longctx.train.train import resolve_stages

    limit_memory(config, device)
    run = training_config(config, seq_len)
    ranks = worlds.start(run.engine.device)
    stage, shape = resolve_stages(run)[0], shape_of_model(run.model)
    init_from(InitConfig(layers=1, hidden=8, heads=2, kv_heads=1, ffn=8, vocab=8))  # imports what a model needs
    meter = Meter(ranks.device)
    model = LossModel(drawn(run, ranks), run.model.memory, z_loss=run.optim.z_loss)
    meter.note("model")
    doing[0] = "building the engine"
    engine = engines.build(run.engine, run.optim, model, ranks)
    meter.note("engine")
    set_rope(model.model, stage.rope, stage.window, precision=run.model.rotary)
    decision = decide(stage, run.parallel, run.engine, Machines(1, 1), (shape.heads, shape.kv_heads))
    wanted = run.model.attention_kernel
    context, _ = open_context_parallel(decision, ranks, None if wanted == "auto" else wanted)
    progress = Progress()
    stepper = Stepper(engine, ranks, Guards(GuardsConfig(), Path("."), ranks, []), progress, decision.cp)
    seconds = loss = 0.0
    for number, tokens in enumerate((min(WARM_UP, seq_len), seq_len)):
        doing[0] = "the first, short step" if number == 0 else "the step"
        batch = micro_batch(RandomTokens(tokens, shape.vocab), [0], context, stage.layout)
        if number and run.model.memory.offload_activations:  # maps the host memory, which a run's later steps find
            engine.forward(**batch.to(ranks.device).inputs)
        wait(ranks.device)
        meter.start()
        began = time.perf_counter()
        report = stepper.take([batch], stage.lr.at(0), step=number, timer=meter)
        wait(ranks.device)
        assert report is not None
        seconds, loss = time.perf_counter() - began, report.loss
    peaks, on_gpu = meter.peaks, ranks.device.type == "cuda"
    context.close()
    engine.close()
    worlds.stop()
    return {
        "seconds": seconds, "loss": loss, "base_gib": meter.base / GIB, "memory_gib": peaks,
        "peak_gib": max(peak for name, peak in peaks.items() if name not in ("model", "engine")),
        "device_name": torch.cuda.get_device_name() if on_gpu else "cpu",
    }  # fmt: skip


def drawn(run: Any, ranks: Any) -> Any:
    """The model; a random one is drawn on a GPU itself, where eight billion weights take seconds."""
    from longctx.model import model_of
    from longctx.train import engine as engines

    on_device = run.model.init is not None and ranks.device.type == "cuda"
    place = None if on_device else engines.placer(run.engine, run.optim, run.model.dtype, ranks)
    with ranks.device if on_device else nullcontext():
        return model_of(run.model, place)


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main(sys.argv[1])
