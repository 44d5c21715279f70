"""Every test of this folder needs a CUDA device: `pytest -m gpu tests/gpu`, or `launch/gpu_check.sh tests`.

LONGCTX_CARD=cpu runs what a CPU can run of them (tests/gpu/card.py).
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.gpu.card import ON_CUDA

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in Path(item.path).parents:
            item.add_marker(pytest.mark.gpu)
            if ON_CUDA and not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Print a failure at once: launch/gpu_check.sh may end pytest before its summary."""
    if report.failed and HERE.name in Path(report.fspath).parts:
        print(f"\n{report.nodeid}\n{report.longreprtext}", flush=True)
