"""The server from which test ranks are forked imports this module once; each rank would otherwise load the same by itself."""

from __future__ import annotations

import gc
import os
from contextlib import suppress
from importlib import import_module

os.environ.setdefault("DS_ACCELERATOR", "cpu")

MODULES = [
    "deepspeed", "hydra", "matplotlib.pyplot", "matplotlib.backends.backend_agg", "peft", "rich.progress",
    "longctx.attention", "longctx.cli", "longctx.config.compose", "longctx.eval.run", "longctx.run.after_training",
    "longctx.run.train", "longctx.run.rank", "longctx.train.loop", "longctx.train.machine", "longctx.train.zero",
    "tests.dist.parity", "tests.train.parity",
    *(f"transformers.models.{name}.modeling_{name}" for name in ("gemma", "mistral", "qwen2", "qwen3")),
]  # fmt: skip
# Parts of libraries that a training step loads; other releases of the libraries lack some of them.
PARTS = ["deepspeed.runtime.zero.muon.muon_optimizer", "torch._dynamo", "torch._inductor.compile_fx"]

for module in MODULES:
    import_module(module)
for module in PARTS:
    with suppress(Exception):
        import_module(module)
with suppress(Exception):  # of all model families, 0.4 s of regular expressions; older releases have no such table
    import_module("transformers.conversion_mapping").get_checkpoint_conversion_mapping("llama")
import_module("hydra.core.plugins").Plugins.instance()  # looks through Hydra's plugins, once per process
_ = import_module("deepspeed").ops.__compatible_ops__  # runs compilers to find out; the answer is kept in the module
gc.freeze()  # a rank's collector does not walk through what the server has loaded
