"""Why a model or dataset cannot be fetched from the Hugging Face hub, and what to do about it, in one sentence."""

from __future__ import annotations

import os
from collections.abc import Iterator


def why_not(error: BaseException, name: str, *, dataset: bool = False) -> str:
    """The reason for an error of huggingface_hub, transformers or datasets while they fetch `name`.

    Tells a gated repository, a machine without network, a cache that lacks the files and a wrong name apart, because
    each has another remedy. Ends without a full stop.
    """
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

    kind, page = ("dataset", f"datasets/{name}") if dataset else ("model", name)
    download = f"`hf download {'--repo-type dataset ' if dataset else ''}{name}`"
    causes = list(_causes(error))
    said = " ".join(str(cause) for cause in causes)
    if any(isinstance(cause, GatedRepoError) for cause in causes) or "is a gated dataset" in said:
        return (
            f"the {kind} is gated: accept its licence on https://huggingface.co/{page}, then `hf auth login`, or set "
            "HF_TOKEN on every node"
        )
    if any(os.environ.get(key, "").upper() in ("1", "TRUE", "YES", "ON") for key in _OFFLINE):
        return (
            f"it is not in the cache and HF_HUB_OFFLINE keeps the hub out; run {download} where there is network, "
            "with the same HF_HOME"
        )
    if any(isinstance(cause, RepositoryNotFoundError) for cause in causes) or "exist on the Hub" in said:
        return f"the hub has no {kind} of that name, or a private one; check the spelling, or `hf auth login`"
    if (
        any(isinstance(cause, LocalEntryNotFoundError | ConnectionError) for cause in causes)
        or "connect" in said.lower()
    ):
        return (
            f"it is not in the cache and the hub cannot be reached; run {download} where there is network, with the "
            "same HF_HOME, or give a local folder"
        )
    return (str(error).strip() or type(error).__name__).splitlines()[0]


_OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__
