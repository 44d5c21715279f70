"""The device of these tests: the first CUDA device, or the CPU with LONGCTX_CARD=cpu.

The CPU shows that the tests themselves still fit the code they call; what they are for needs a card.
"""

from __future__ import annotations

import os

import pytest
import torch

KIND = os.environ.get("LONGCTX_CARD", "cuda")
ON_CUDA = KIND == "cuda"
CARD = torch.device(KIND, 0) if ON_CUDA else torch.device(KIND)
DTYPE = torch.bfloat16 if ON_CUDA else torch.float32
DTYPE_NAME = str(DTYPE).removeprefix("torch.")
ON_CARD = [f"model.dtype={DTYPE_NAME}", f"engine.device={KIND}"]  # of `longctx train`

needs_cuda = pytest.mark.skipif(not ON_CUDA, reason="needs a CUDA device")


def wait() -> None:
    """Wait until the device has done all that it was given."""
    if ON_CUDA:
        torch.cuda.synchronize()
