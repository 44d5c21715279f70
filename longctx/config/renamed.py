"""What took the place of a key or choice, for the message that refuses it: one table for old names of our own, one
for names people know from other tools.
"""

from __future__ import annotations

# Old key -> new key, in full. A `*` stands for any one part (a stage's name): "curriculum.stages.*.x".
RENAMED: dict[str, str] = {}

# Keys of other tools -> ours.
ELSEWHERE = {
    "model_name_or_path": "model.path",
    "output_dir": "run_dir",
    "learning_rate": "curriculum.lr.peak",
    "lr": "curriculum.lr.peak",
    "bf16": "model.dtype=bfloat16",
    "gradient_checkpointing": "model.memory.checkpoint",
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
    "parallel=cp": "parallel=ring for all ranks, or parallel.cp=N",
    "data=hub": "data=text with data.sources.text.kind=hub and data.sources.text.name=DATASET",
    "logging=tensorboard": "RUN/metrics.jsonl has every step; logging=wandb draws them",
    "rope=pi": "rope=linear is position interpolation",
}


def renamed(key: str) -> str | None:
    """The end of a refusal that names the key now called otherwise: "is now `optim.max_grad_norm`"."""
    parts = key.split(".")
    for old, new in RENAMED.items():
        pattern = old.split(".")
        if len(pattern) == len(parts) and all(a in ("*", b) for a, b in zip(pattern, parts, strict=True)):
            stars = iter([b for a, b in zip(pattern, parts, strict=True) if a == "*"])
            return f"is now `{'.'.join(next(stars) if part == '*' else part for part in new.split('.'))}`"
    return f"is not a known key; longctx calls it {ELSEWHERE[key]}" if key in ELSEWHERE else None
