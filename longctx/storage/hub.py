"""The Hugging Face hub: whether it can be reached, and why a model or dataset cannot be fetched from it.

Without network, huggingface_hub tries every request again for half a minute. One short connection finds that out first,
and from then on models and datasets are read from the cache only.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from longctx.errors import UserError

CONNECT_SECONDS = 3.0
REQUEST_SECONDS = 20.0
_READ = ("config.json", "model*.safetensors", "pytorch_model*.bin", "tokenizer.json", "tokenizer_config.json")
_OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")  # both set huggingface_hub's offline mode
_UNREACHABLE = "LONGCTX_HUB_UNREACHABLE"  # set here, so that child processes do not look again


def looks_local(path: str) -> bool:
    """Whether `path` exists or cannot be a hub id; hub ids are NAME or OWNER/NAME."""
    return Path(path).exists() or path.startswith((".", "/", "~")) or path.count("/") > 1 or path.endswith("/")


@cache
def offline() -> bool:
    """Whether hub models and datasets come from the cache only: the environment says so, or no connection succeeds.

    The first call tries to connect, for at most CONNECT_SECONDS. If that fails, it switches huggingface_hub,
    transformers and datasets to their offline mode, in this process and in the processes that it starts.
    """
    if any(_is_set(name) for name in _OFFLINE):
        return True
    if _reachable(os.environ.get("HF_ENDPOINT") or "https://huggingface.co"):
        return False
    os.environ.update({"HF_HUB_OFFLINE": "1", _UNREACHABLE: "1"})
    for name in ("huggingface_hub.constants", "datasets.config"):  # these read the variable when they were imported
        if name in sys.modules:
            vars(sys.modules[name])["HF_HUB_OFFLINE"] = True
    return True


def _reachable(endpoint: str) -> bool:
    """Whether the host of a URL, or the proxy that the environment names for it, accepts a connection."""
    address = urlsplit(endpoint)
    proxies = getproxies()
    proxy = proxies.get(address.scheme) or proxies.get("all")
    if proxy and not proxy_bypass(address.netloc):
        address = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    port = address.port or {"https": 443, "socks5": 1080, "socks5h": 1080}.get(address.scheme, 80)
    answers: SimpleQueue[bool] = SimpleQueue()
    # In threads: looking up a name has no time limit of its own, and a network often loses the packets to the IPv6
    # addresses of a host that answers at its IPv4 ones.
    Thread(target=_connect_to_any, args=(address.hostname, port, answers), daemon=True).start()
    try:
        return answers.get(timeout=CONNECT_SECONDS)
    except Empty:
        return False


def _connect_to_any(host: str | None, port: int, answers: SimpleQueue[bool]) -> None:
    """Try every address of a host at once; put True when one accepts, and False when all have refused."""

    def connect(place: tuple[Any, ...]) -> None:
        try:
            socket.create_connection(place[:2], timeout=CONNECT_SECONDS).close()
            answers.put(True)
        except OSError:
            pass

    try:
        places = {found[4] for found in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)}
    except OSError:
        places = set()
    threads = [Thread(target=connect, args=(place,), daemon=True) for place in places]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    answers.put(False)


def cached(name: str) -> Path:
    """The folder that holds the cached files of a hub model, which may lack some; raises an OSError if none are."""
    from huggingface_hub import snapshot_download

    # The pattern keeps huggingface_hub from refusing a repository of which only the needed files were fetched.
    return Path(snapshot_download(name, local_files_only=True, allow_patterns=["config.json"]))


@cache
def revision(name: str) -> str:
    """A hub id with a hash of the files that are read now, NAME@HASH: the hub's newest, or the cache's without network.

    A commit that changes only other files, such as the model card, is no other revision. A local path is returned as it
    is, and so is a name of which nothing is known: whoever loads it says why.
    """
    if looks_local(name):
        return name
    from huggingface_hub import HfApi

    with suppress(Exception):  # the types that downloads raise depend on huggingface_hub's release
        if not offline():
            listed = HfApi().model_info(name, files_metadata=True, timeout=REQUEST_SECONDS).siblings or []
            return _with_hash(name, {file.rfilename: file.lfs.sha256 if file.lfs else file.blob_id for file in listed})
    with suppress(Exception):
        # The cache's files are links to blobs, which have the hub's hashes for names; where they are files, the commit
        # has to do.
        folder = cached(name)
        blobs = {file.name: os.readlink(file).rsplit("/", 1)[-1] for file in folder.iterdir() if file.is_symlink()}
        return _with_hash(name, blobs) if blobs else f"{name}@{folder.name}"
    return name


def _with_hash(name: str, hashes: Mapping[str, str | None]) -> str:
    """NAME@HASH of the files that loading fetches in any case, so that a cache tells the same as the hub."""
    read = {file: digest for file, digest in hashes.items() if any(fnmatch(file, pattern) for pattern in _READ)}
    return f"{name}@{hashlib.sha256(json.dumps(read, sort_keys=True).encode()).hexdigest()[:16]}"


@contextmanager
def fetching(name: str, what: str, errors: type[Exception] = Exception) -> Iterator[None]:
    """Turn an error while the files of a hub model are fetched into a UserError that says why and what to do.

    name: the hub id; the errors of a local path pass. what: the config key that gives it, for the message.
    errors: those to expect. Downloads without network raise what the HTTP library of huggingface_hub's release raises.
    """
    try:
        yield
    except errors as error:
        if looks_local(name):
            raise
        raise UserError(f"{what}={name} is no folder here, and not read from the hub: {why_not(error, name)}") from None


def why_not(error: BaseException, name: str, *, dataset: bool = False) -> str:
    """The reason for an error of huggingface_hub, transformers or datasets while they fetch `name`.

    Tells a gated repository, a machine without network, a cache that lacks the files and a wrong name apart, because
    each has another remedy. Ends without a full stop.
    """
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

    kind, page = ("dataset", f"datasets/{name}") if dataset else ("model", name)
    # Without network, datasets reads only what it has prepared itself, and not what `hf download` fetched.
    fetch = "`longctx data` with these settings" if dataset else f"`hf download {name}`"
    causes = list(_causes(error))
    said = " ".join(str(cause) for cause in causes)
    if any(isinstance(cause, GatedRepoError) for cause in causes) or "is a gated dataset" in said:
        return (
            f"the {kind} is gated: accept its licence on https://huggingface.co/{page}, then `hf auth login`, or set "
            "HF_TOKEN on every node"
        )
    if not _is_set(_UNREACHABLE) and any(_is_set(key) for key in (*_OFFLINE, "HF_DATASETS_OFFLINE")):
        return (
            f"it is not in the cache and HF_HUB_OFFLINE keeps the hub out; run {fetch} where there is network, "
            "with the same HF_HOME"
        )
    if any(isinstance(cause, RepositoryNotFoundError) for cause in causes) or "exist on the Hub" in said:
        return f"the hub has no {kind} of that name, or a private one; check the spelling, or `hf auth login`"
    if (
        any(isinstance(cause, LocalEntryNotFoundError | ConnectionError) for cause in causes)
        or "connect" in said.lower()
    ):
        return (
            f"it is not in the cache and the hub cannot be reached; run {fetch} where there is network, with the same "
            f"HF_HOME{'' if dataset else ', or give a local folder'}"
        )
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "").upper() in ("1", "TRUE", "YES", "ON")


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__
