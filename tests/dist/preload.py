"""Imported once by the server that test ranks are forked from: what each rank would otherwise load by itself."""

from __future__ import annotations

import gc
import os

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
import deepspeed.runtime.zero.muon.muon_optimizer  # loads torch._inductor
import peft  # noqa: F401
import rich.progress
import torch._dynamo
import torch._inductor.compile_fx
from transformers.models.gemma import modeling_gemma  # noqa: F401
import hydra
import longctx.config.compose
import longctx.run.after_training
from transformers.models.mistral import modeling_mistral  # noqa: F401
from transformers.models.qwen2 import modeling_qwen2  # noqa: F401
from transformers.models.qwen3 import modeling_qwen3  # noqa: F401

import longctx.attention
import longctx.run.rank
import longctx.train.loop
import longctx.train.zero
import tests.dist.parity
import tests.train.parity  # noqa: F401

_ = deepspeed.ops.__compatible_ops__  # runs compilers to find out; the answer is kept in the module
gc.freeze()  # a rank's collector does not walk through what the server has loaded
