"""The oldest torch that longctx runs on; this module imports nothing heavy, so that every command can check it."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, version

from longctx.errors import UserError

TORCH_MINIMUM = (2, 11)  # as in pyproject.toml


def check_torch() -> None:
    """Raise UserError, in one line, when the installed torch is older than longctx needs."""
    try:
        installed = version("torch")
    except PackageNotFoundError:  # importing it says more
        return
    numbers = re.match(r"(\d+)\.(\d+)", installed)
    if numbers and (int(numbers[1]), int(numbers[2])) < TORCH_MINIMUM:
        wanted = ".".join(map(str, TORCH_MINIMUM))
        raise UserError(
            f"torch {installed} is older than longctx needs: pip install 'torch>={wanted}' (pyproject.toml)"
        )
