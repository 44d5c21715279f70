"""What took the place of a key or choice, for the message that refuses it: one table for old names of our own, one
for names people know from other tools.
"""

from __future__ import annotations

from collections.abc import Iterable

# Old key -> new key, both in the same section. A `*` stands for any one part, such as a source's name.
RENAMED: dict[str, str] = {
    "hooks": "after_training",
    "parallel.stages": "parallel.cp_by_stage",
    "parallel.tokens_per_rank": "parallel.seq_len_per_rank",
    "model.memory.checkpoint": "model.memory.activation_checkpointing",
    "model.memory.offload": "model.memory.offload_activations",
    "memory.checkpoint": "memory.activation_checkpointing",
    "memory.offload": "memory.offload_activations",
    "optim.clip": "optim.max_grad_norm",
    "engine.secondary_partition": "engine.hpz_partition_size",
    "logging.every": "logging.every_steps",
    "checkpoint.every": "checkpoint.every_steps",
    "checkpoint.minutes": "checkpoint.every_minutes",
    "guards.spike": "guards.spike_factor",
    "guards.spike_window": "guards.spike_median_steps",
    "guards.spike_steps": "guards.max_skipped_steps",
    "after_training.evidence.heldout_windows": "after_training.evidence.heldout_sequences",
    "data.sources.*.min_tokens": "data.sources.*.min_len",
    "data.sources.*.max_tokens": "data.sources.*.max_len",
    "data.sources.*.task.hops": "data.sources.*.task.links",
    "task.hops": "task.links",
    "draw.tokens": "draw.seq_len",
    "text_window": "text_seq_len",
    "loss_windows": "loss_sequences",
    "tokens": "seq_len",
}

# Keys of other tools -> ours.
ELSEWHERE = {
    "model_name_or_path": "model.path",
    "output_dir": "run_dir",
    "learning_rate": "curriculum.lr.peak",
    "lr": "curriculum.lr.peak",
    "bf16": "model.dtype=bfloat16",
    "gradient_checkpointing": "model.memory.activation_checkpointing",
    "recompute_granularity": "model.memory.keep_attention",
    "per_device_train_batch_size": "curriculum.stages.NAME.batch",
    "max_steps": "curriculum.stages.NAME.steps",
    "max_seq_length": "curriculum.stages.NAME.seq_len",
    "report_to": "logging=wandb",
}

# Choices of other tools, as group=choice or the key's last part=value -> what to write and why.
INSTEAD = {
    "curriculum=_base": "leave `defaults` out of a curriculum's file; the schema has every default",
    "curriculum=_stage": "leave `defaults` out of a curriculum's file; the schema has every default",
    "device=gpu": "device=cuda",
    "dtype=float16": "bfloat16, which has float32's range and needs no loss scaling",
    "attention=flash_attention_2": "longctx, which chooses the fastest kernel that serves (`longctx doctor` shows it)",
    "engine=fsdp": "engine=deepspeed engine.zero=3 shards weights, gradients and optimizer as FSDP does",
    "engine=fsdp2": "engine=deepspeed engine.zero=3 shards weights, gradients and optimizer as FSDP2 does",
    "engine=zero": "engine=deepspeed with engine.zero=1, 2 or 3",
    "engine=accelerate": "engine=deepspeed goes through accelerate; engine=ddp needs no wrapper",
    "engine=megatron": "long sequences are shared by parallel.cp, weights by engine=deepspeed engine.zero=3",
    "parallel=ulysses": "parallel.schedule=ulysses_ring, with parallel.ulysses ranks that trade heads",
    "parallel=cp": "parallel.cp=all for all ranks (parallel=ring), or parallel.cp=N",
    "data=hub": "data=text with data.sources.text.kind=hub and data.sources.text.name=DATASET",
    "logging=tensorboard": "RUN/metrics.jsonl has every step; logging=wandb draws them",
    "rope=pi": "rope=linear is position interpolation",
}


def renamed(key: str, known: Iterable[str]) -> str | None:
    """Return the end of a refusal that names the new key: "is now `optim.max_grad_norm`". known: the section's keys."""
    parts = key.split(".")
    for old, new in RENAMED.items():
        pattern = old.split(".")
        if new.rpartition(".")[2] not in known or len(pattern) != len(parts):
            continue
        if all(a in ("*", b) for a, b in zip(pattern, parts, strict=True)):
            stars = iter([b for a, b in zip(pattern, parts, strict=True) if a == "*"])
            return f"is now `{'.'.join(next(stars) if part == '*' else part for part in new.split('.'))}`"
    return f"is not a known key; longctx calls it {ELSEWHERE[key]}" if key in ELSEWHERE else None
