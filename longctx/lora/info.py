"""The verb lora info: describes an adapter, with pictures on request, or sizes one that does not exist yet."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

from longctx.config.lora import InfoConfig
from longctx.console import emit_json
from longctx.errors import UserError
from longctx.lora.describe import AdapterInfo, describe
from longctx.lora.folder import ONE_WEIGHT
from longctx.lora.sizes import adapter_size, measure_throughput, megabytes


def run(config: InfoConfig) -> int:
    """Run `longctx lora info`; returns the exit status."""
    if (config.adapter is None) == (config.plan is None):
        raise UserError("give adapter=FOLDER to describe one, or plan=MODEL to size one (configs/lora_info.yaml)")
    if config.plan is not None:
        return _run_size(config, config.plan)
    assert config.adapter is not None
    info = describe(config.adapter)
    pictures: list[str] = []
    if config.plots is not None:
        from longctx.lora.pictures import draw  # matplotlib is slow to import

        pictures = draw(info, Path(config.plots))
    if config.format == "json":
        emit_json({**asdict(info), "pictures": pictures})
    else:
        _print(info, pictures)
    return 0


def _run_size(config: InfoConfig, plan: str) -> int:
    size = adapter_size(plan, config.rank, dtype=config.dtype, lm_head=config.lm_head, embeddings=config.embeddings)
    if config.measure:
        rate = measure_throughput(config.rank)
        size = replace(size, seconds=size.elements / rate, throughput=rate)
    if config.format == "json":
        emit_json(asdict(size))
        return 0
    print(f"{size.model}, rank {size.rank}: {megabytes(size.bytes)} in {config.dtype}")
    per_rank = size.bytes_per_rank / 1e6
    print(f"  {size.matrices} matrices, {size.elements / 1e9:.2f} B numbers, {per_rank:.3f} MB per rank")
    if size.seconds is not None and size.throughput is not None:
        print(
            f"  about {_duration(size.seconds)} here ({size.throughput / 1e6:.0f} M numbers/s measured on a sample, "
            "reading not counted)"
        )
    return 0


def _print(info: AdapterInfo, pictures: list[str]) -> None:
    ranks = sorted({item.rank for item in info.modules})
    print(f"{info.path}: LoRA of {info.base}, {len(info.modules)} modules, {megabytes(info.bytes)}")
    print(f"  rank {ranks[0] if len(ranks) == 1 else f'{ranks[0]}-{ranks[-1]}'}" if ranks else "  no factors")
    if info.window is not None:
        told = "extends the window to" if info.extends else "window"
        print(f"  {told} {info.window} tokens ({info.rope})")
    else:
        print("  no rope or window inside: lora merge needs rope.theta and window, or like=MODEL, or rope=keep")
    if info.share is not None:
        print(f"  keeps {info.share:.4f} of the squared norm of these matrices' difference")
    print(f"  {info.exact} norms and biases as exact differences, {len(info.replaced)} tensors saved whole")
    if info.one_weight:
        print(f"  {ONE_WEIGHT}")
    print(f"  {'module':<44} {'rank':>4} {'share':>7}  singular values: 1st, 2nd, 4th, ..., last")
    for item in info.modules:
        picks = sorted({0, 1, 3, 7, 15, 31, 63, len(item.spectrum) - 1} & set(range(len(item.spectrum))))
        share = f"{item.share:.4f}" if item.share is not None else "-"
        values = " ".join(f"{item.spectrum[i]:.3g}" for i in picks)
        print(f"  {item.module:<44} {item.rank:>4} {share:>7}  {values}")
    for picture in pictures:
        print(f"  {picture}")


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
