"""The installed releases, and the oldest that longctx runs on; importing it is cheap, so that any command can check."""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

from longctx.errors import UserError

# As in pyproject.toml: what every verb imports, and what only some runs do.
MINIMUM = {
    "torch": "2.11",
    "transformers": "5.0",
    "hydra-core": "1.3.2",
    "pydantic": "2.9",
    "numpy": "1.26",
    "safetensors": "0.5",
    "accelerate": "1.10",
    "deepspeed": "0.19.8",
    "wandb": "0.20",
}
EVERY_VERB = ("torch", "transformers", "hydra-core", "pydantic", "numpy", "safetensors")


def check_versions(names: Sequence[str] = EVERY_VERB) -> None:
    """Raise UserError, in one line, when an installed package is older than longctx needs."""
    for name in names:
        try:
            found = version(name)
        except PackageNotFoundError:  # importing it says more
            continue
        if _numbers(found) < _numbers(MINIMUM[name]):
            raise UserError(
                f"{name} {found} is older than longctx needs: pip install '{name}>={MINIMUM[name]}' (pyproject.toml)"
            )


def installed(name: str) -> str | None:
    """The version of an installed package; torch's with its build (2.15.0+cu132), which its metadata may leave out."""
    try:
        found = version(name)
    except PackageNotFoundError:
        return None
    return str(import_module("torch").__version__) if name == "torch" else found


def _numbers(release: str) -> tuple[int, ...]:
    """The numbers of a release as a tuple of three: (2, 11, 0) of 2.11, and of 2.11.0a0+cu130."""
    found = [int(number) for number in re.findall(r"\d+", re.split(r"[^\d.]", release)[0])]
    return tuple([*found, 0, 0, 0][:3])
