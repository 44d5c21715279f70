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


def known_config(path: str) -> Path | None:
    """The folder in the package that holds the config.json of this hub id; None for any other path.

    A folder of that name on this machine goes first. `plan` needs no more of a model, so a preset is planned without
    network and without a licence to its weights.
    """
    folder = _HERE / "configs" / path
    known = path in known_models() and not Path(path).exists()
    return folder if known else None
