"""Extracts tuned - base as a LoRA, one tensor at a time, measures its errors and checks its sign.

The two models are compared before any weight is read. Differences are computed in fp32 (Difference), approximated at
rank r (lowrank), and measured again with the factors as they are written. The result does not depend on the number of
workers: one worker with one thread processes a tensor, and files are written in a fixed order.
"""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, replace
from math import prod, sqrt
from pathlib import Path
from threading import local

import torch
from torch import Tensor

from longctx.config.lora import ExtractConfig
from longctx.errors import UserError
from longctx.lora import folder as files
from longctx.lora.adapter import NORM_STEM, Adapter
from longctx.lora.difference import Difference, require_finite
from longctx.lora.folder import Extension, TensorRecord
from longctx.lora.lowrank import Factors, Sketch, decompose, start_linalg
from longctx.lora.modules import (
    Module,
    WeightKind,
    carried_rope,
    check_pair,
    check_weights,
    layout,
    leaf_of,
    modules_of,
)
from longctx.lora.rank_choice import fit_size, rank_for_share
from longctx.lora.shards import FactorWriter
from longctx.lora.tensors import Scratch, StoredTensors
from longctx.lora.ties import resolve_ties_of_pair
from longctx.lora.verify import HeldOutLosses, held_out_losses, read_back
from longctx.lora.writer import output_folder
from longctx.storage.files import write_json
from longctx.storage.writer import SafetensorsWriter
from longctx.threads import one_thread_each

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class ExtractResult:
    """The result of an extraction.

    out: the adapter's folder. rows: one record per tensor. bytes: see Adapter.bytes. share: see folder.totals. checked:
    tensors that were read back. losses: with verify=loss. one_weight: the factors of the embedding are those
    of the output layer too (see folder.ONE_WEIGHT).
    """

    out: str
    rank: int
    rows: list[TensorRecord]
    extension: Extension
    bytes: int
    share: dict[str, float]
    checked: list[str]
    losses: HeldOutLosses | None
    one_weight: bool

    @property
    def not_carried(self) -> list[TensorRecord]:
        """Tensors that the training changed and the adapter does not carry."""
        return [row for row in self.rows if row.carried == "no" and row.norm > 0]


@dataclass(frozen=True)
class _TensorResult:
    """The result for one tensor: its record, and the factors or the exact difference to write."""

    row: TensorRecord
    a: Tensor | None = None
    b: Tensor | None = None
    exact: Tensor | None = None
    values: Tensor | None = None


def extract(config: ExtractConfig, progress: Progress | None = None) -> ExtractResult:
    """Write the adapter `config.out` that carries tuned - base.

    progress(done, total, tensor) is called after each tensor. Raises UserError if the two models have no meaningful
    difference; then no files are left.
    """
    _check_options(config)
    rounding = None if config.base_dtype == "stored" else getattr(torch, config.base_dtype)
    with (
        StoredTensors(config.base, what="base", rounding=rounding) as base,
        StoredTensors(config.tuned, what="tuned") as tuned,
    ):
        for tensors in (base, tuned):
            check_weights(tensors)
        tied_head, tied = resolve_ties_of_pair(base, tuned)
        check_pair(base, tuned, allow_shorter=config.allow_shorter)
        modules = sorted(modules_of(base), key=lambda m: (-prod(m.entry.shape), m.entry.name))
        job = _Extraction(config, base, tuned, tied, tied_head)
        ranks = _ranks_for_size(job, modules) if config.size_mb is not None else {}
        with output_folder(config.out, needed=_bytes_needed(job, modules, ranks)) as partial:
            parts = list(_write_tensors(job, modules, ranks, partial, progress))
            rows = [part.row for part in parts]
            _refuse_identical(rows, config)
            extension = _extension(base, tuned)
            described = files.adapter_config(rows, config.base, rslora=config.rslora, tied_head=tied_head)
            write_json(partial / "adapter_config.json", described)
            files.write_extension_file(partial, rows, extension, layout(base.config()), config)
            one_weight = described["ensure_weight_tying"]
            files.write_card(partial, rows, extension, config, one_weight=one_weight)
            checked = read_back(partial, base, tuned, rows)
            losses = held_out_losses(config, partial) if config.verify == "loss" else None
            with Adapter(str(partial)) as adapter:
                size = adapter.bytes
    return ExtractResult(
        config.out, described["r"], rows, extension, size, files.totals(rows), checked, losses, one_weight
    )


class _Extraction:
    """The inputs and settings of one extraction, and one scratch buffer per worker.

    tied_head: the output layer that shares the embedding's factors, or None.
    """

    def __init__(
        self, config: ExtractConfig, base: StoredTensors, tuned: StoredTensors, tied: bool, tied_head: str | None
    ) -> None:
        self.config, self.base, self.tuned, self.tied_head = config, base, tuned, tied_head
        serving = config.profile == "serving"
        self.head = not serving if config.lm_head is None else config.lm_head
        # With tied embeddings the embedding is the output layer as well.
        self.embeddings = (tied and not serving) if config.embeddings is None else config.embeddings
        self.dtype = getattr(torch, config.precision)
        self.stored = getattr(torch, config.dtype)
        self.device = torch.device(_device(config.device))
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self.workers = config.workers or min(8, cores)
        room = config.memory_mib * 2**20
        if self.device.type == "cuda":
            # On a GPU half of what is free now, since nothing else is kept there.
            room = torch.cuda.mem_get_info(self.device)[0] // 2
        self.budget = room // self.workers
        self._local = local()

    def carried(self, module: Module) -> str:
        return files.carried_as(module.kind, profile=self.config.profile, head=self.head, embeddings=self.embeddings)

    def rank(self, module: Module, ranks: dict[str, int]) -> int:
        return min(ranks.get(module.entry.name, self.config.rank), *module.entry.shape)

    def bytes_per_rank(self, module: Module) -> int:
        """Bytes of the module's factors per rank; an embedding's factors are also written for a tied output layer."""
        twice = module.kind is WeightKind.EMBEDDING and self.tied_head is not None
        return sum(module.entry.shape) * self.stored.itemsize * (2 if twice else 1)

    def difference(self, module: Module) -> Difference:
        if not hasattr(self._local, "scratch"):
            self._local.scratch = Scratch()
        return Difference(
            self.base, self.tuned, module.entry.name, dtype=self.dtype, device=self.device,
            budget=self.budget, scratch=self._local.scratch,
        )  # fmt: skip

    def sketch(self, module: Module) -> Sketch:
        digest = hashlib.sha256(f"{self.config.seed}:{module.entry.name}".encode()).digest()
        seed = int.from_bytes(digest[:7], "little")
        return Sketch(self.config.oversample, self.config.power_max, self.config.tolerance, seed)

    def map(self, work: Callable[[Module], _TensorResult], modules: list[Module]) -> Iterator[_TensorResult]:
        """Yield the results in the order of `modules`, with several modules in work at a time."""
        start_linalg(self.device)
        with one_thread_each(self.workers) as pool:
            waiting: deque[Future[_TensorResult]] = deque()
            try:
                for module in modules:
                    waiting.append(pool.submit(work, module))
                    if len(waiting) > 64:
                        yield waiting.popleft().result()
                while waiting:
                    yield waiting.popleft().result()
            finally:
                for future in waiting:
                    future.cancel()


def _write_tensors(
    job: _Extraction, modules: list[Module], ranks: dict[str, int], partial: Path, progress: Progress | None
) -> Iterator[_TensorResult]:
    """Write factors and exact differences to their files as they arrive, and yield the records."""
    names = [module.name for module in modules if job.carried(module) == "factors"]
    names += [job.tied_head] if job.tied_head else []
    vectors = [module.entry.name for module in modules if job.carried(module) == "exact"]
    writer = FactorWriter(partial, names, max_bytes=int(job.config.max_shard_mb * 1e6))
    exact = SafetensorsWriter(partial / f"{NORM_STEM}.safetensors", vectors) if vectors else None
    unchanged: list[_TensorResult] = []
    changed_leaves: set[str] = set()
    for done, part in enumerate(job.map(lambda module: _work(job, module, ranks), modules), 1):
        if part.a is not None and part.b is not None:
            if part.row.norm == 0:
                unchanged.append(part)
            else:
                changed_leaves.add(leaf_of(part.row.tensor))
                writer.add(part.row.tensor, part.row.kind, part.a, part.b)
                if part.row.kind == WeightKind.EMBEDDING.value and job.tied_head is not None:
                    writer.add(job.tied_head, WeightKind.HEAD.value, part.b.T.contiguous(), part.a.T.contiguous())
        elif part.exact is not None and exact is not None and part.row.norm > 0:
            exact.add(part.row.tensor, part.exact)
        if part.row.norm > 0 or part.a is None:
            yield replace(part, a=None, b=None, exact=None)
        if progress is not None:
            progress(done, len(modules), part.row.tensor)
    for part in unchanged:
        # PEFT selects modules by the last part of their names, so an unchanged module of that name needs zero factors.
        needed = leaf_of(part.row.tensor) in changed_leaves
        if needed and part.a is not None and part.b is not None:
            writer.add(part.row.tensor, part.row.kind, part.a, part.b)
        row = replace(part.row, carried="factors" if needed else "no", rank=1 if needed else 0)
        yield _TensorResult(row)
    writer.close()
    if exact is not None:
        exact.close()
        if not exact.written:
            exact.path.unlink()


def _work(job: _Extraction, module: Module, ranks: dict[str, int]) -> _TensorResult:
    difference, how = job.difference(module), job.carried(module)
    if how == "factors":
        return _factor(job, module, difference, ranks)
    norm_squared = difference.norm_squared()
    require_finite(norm_squared, module.entry.name, job.config.base, job.config.tuned)
    row = _row(module, difference, rank=0, norm=sqrt(norm_squared), kept=how == "exact", carried=how)
    if how == "exact":
        dense = difference.dense()
        assert dense is not None, "norms and biases are small"
        return _TensorResult(row, exact=dense[0].to("cpu", torch.float32, copy=True))
    return _TensorResult(row)


def _factor(job: _Extraction, module: Module, difference: Difference, ranks: dict[str, int]) -> _TensorResult:
    factors = _decompose(job, module, difference, ranks)
    require_finite(factors.total, module.entry.name, job.config.base, job.config.tuned)
    rank = len(factors.values)
    scale = sqrt(rank) if job.config.rslora else 1.0
    root = (factors.values.clamp_min(0) / scale).sqrt()
    left = (factors.left * root).to("cpu", job.stored)
    right = (factors.right * root).T.to("cpu", job.stored)
    norm = sqrt(factors.total)
    left_over = difference.residual_squared(left, right, scale) if norm else 0.0
    if not left_over <= factors.total * (1 + 1e-6):
        raise UserError(
            f"{module.entry.name}: its factors in {job.config.dtype} are further from the difference than nothing at "
            f"all (relative residual {sqrt(left_over) / norm:.3g}); use dtype=float32"
        )
    share = 1 - left_over / factors.total if norm else 1.0
    row = TensorRecord(module.entry.name, module.kind.value, list(module.entry.shape), rank, norm, share,
              sqrt(left_over / factors.total) if norm else 0.0, factors.method, factors.converged, "factors",
              difference.sha256)  # fmt: skip
    if module.kind is WeightKind.EMBEDDING:
        return _TensorResult(row, a=left.T.contiguous(), b=right.T.contiguous())
    return _TensorResult(row, a=right.contiguous(), b=left.contiguous())


def _decompose(job: _Extraction, module: Module, difference: Difference, ranks: dict[str, int]) -> Factors:
    if job.config.share is None:
        return decompose(difference, job.rank(module, ranks), job.sketch(module))
    return rank_for_share(difference, job.config.share, job.config.max_rank, job.sketch(module))


def _ranks_for_size(job: _Extraction, modules: list[Module]) -> dict[str, int]:
    """Compute all spectra in a first pass, and choose the ranks that fit the size."""
    chosen = [module for module in modules if job.carried(module) == "factors"]

    def spectrum(module: Module) -> _TensorResult:
        difference = job.difference(module)
        factors = decompose(difference, job.config.max_rank, job.sketch(module))
        require_finite(factors.total, module.entry.name, job.config.base, job.config.tuned)
        row = _row(module, difference, rank=0, norm=sqrt(factors.total), kept=False, carried="factors")
        return _TensorResult(row, values=factors.values.cpu())

    spectra = {part.row.tensor: part.values for part in job.map(spectrum, chosen) if part.values is not None}
    assert job.config.size_mb is not None
    cost = {module.entry.name: job.bytes_per_rank(module) for module in chosen}
    return fit_size(spectra, cost, job.config.size_mb * 1e6)


def _row(module: Module, difference: Difference, *, rank: int, norm: float, kept: bool, carried: str) -> TensorRecord:
    return TensorRecord(module.entry.name, module.kind.value, list(module.entry.shape), rank, norm, float(kept),
               float(not kept and norm > 0), "-", True, carried, difference.sha256)  # fmt: skip


def _extension(base: StoredTensors, tuned: StoredTensors) -> Extension:
    rope, window = carried_rope(tuned)
    base_rope, base_window = carried_rope(base)
    return Extension(rope, window, base_rope, base_window)


def _bytes_needed(job: _Extraction, modules: list[Module], ranks: dict[str, int]) -> int:
    """An upper bound of the bytes that will be written."""
    total = 2**20
    for module in modules:
        how = job.carried(module)
        if how == "factors":
            rank = job.config.max_rank if job.config.share is not None else job.rank(module, ranks)
            total += min(rank, *module.entry.shape) * job.bytes_per_rank(module)
        elif how == "exact":
            total += prod(module.entry.shape) * 4
    return total


def _refuse_identical(rows: list[TensorRecord], config: ExtractConfig) -> None:
    if not any(row.norm > 0 for row in rows):
        raise UserError(
            f"base={config.base} and tuned={config.tuned} hold the same numbers in all {len(rows)} tensors: there is "
            "no difference to extract; check that tuned is the trained model (nothing was written)"
        )
    if not any(row.carried == "factors" for row in rows):
        raise UserError(
            f"only norms, biases or embeddings differ between base={config.base} and tuned={config.tuned}; no linear "
            "layer changed, so there is no LoRA to write; embeddings=true carries embeddings (nothing was written)"
        )


def _check_options(config: ExtractConfig) -> None:
    if config.share is not None and config.size_mb is not None:
        raise UserError("share and size_mb both choose the ranks; give one of them (configs/lora_extract.yaml)")
    if config.profile == "serving" and (config.lm_head or config.embeddings):
        raise UserError(
            "profile=serving carries layers only, since vLLM refuses adapters with lm_head or embeddings; use "
            "profile=full, or leave lm_head and embeddings out (configs/lora_extract.yaml)"
        )
    if config.verify == "loss" and config.text is None:
        raise UserError("verify=loss needs text=FILE, a text neither model was trained on (configs/lora_extract.yaml)")


def _device(asked: str) -> str:
    if asked == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if asked.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"device={asked}: torch sees no GPU here; use device=cpu (configs/lora_extract.yaml)")
    if asked.startswith("cuda") and int(asked[5:] or 0) >= torch.cuda.device_count():
        raise UserError(f"device={asked}: torch sees {torch.cuda.device_count()} GPUs here (configs/lora_extract.yaml)")
    return asked
