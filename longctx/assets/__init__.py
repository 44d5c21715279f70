"""Files in the package: the tiny base model of the quickstart, and the config.json of models that presets name."""

from __future__ import annotations

from pathlib import Path

_HERE = Path(__file__).resolve().parent


def tiny_model() -> Path:
    """Return the folder of the tiny Llama, which `experiment=tiny_base` trains with a window of 512 tokens."""
    return _HERE / "tiny"


def known_models() -> list[str]:
    """The hub ids whose config.json is in the package: sizes, rope and dtype, no weights and no tokenizer."""
    return sorted(str(file.parent.relative_to(_HERE / "configs")) for file in _HERE.glob("configs/*/*/config.json"))


def config_folder(path: str) -> str:
    """Where a verb that needs only config.json reads it: the package's folder of a hub id that it knows, else `path`.

    A folder of that name on this machine goes first. So `plan`, `theta` without a search and `rope_for` need neither
    network nor a licence to the weights; whatever loads a model keeps to `path`.
    """
    known = path in known_models() and not Path(path).exists()
    return str(_HERE / "configs" / path) if known else path
