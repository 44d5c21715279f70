"""The hub refuses a model or dataset, or cannot be reached: gated, unknown, no network, not in the cache.

Each has its own remedy, and a cached model is read without the hub. A server on loopback answers as the hub does
(status and X-Error-Code), so that huggingface_hub's own errors are raised.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from longctx.errors import UserError
from longctx.fingerprint import MODEL, content_hashes, folder_fingerprint
from longctx.storage import hub as hub_module
from longctx.storage.model_files import open_source
from longctx.train import identity

TINY = Path(hub_module.__file__).parents[1] / "assets" / "tiny"
ANSWERS = {"gated": (403, "GatedRepo"), "unknown": (401, "RepoNotFound"), "broken": (400, "")}


class Answer(BaseHTTPRequestHandler):
    """Every request for `some/NAME` gets NAME's answer."""

    def do_GET(self) -> None:
        status, code = next((answer for name, answer in ANSWERS.items() if f"some/{name}" in self.path), (404, ""))
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
            self.send_header("X-Error-Message", f"{code} here")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, format: str, *arguments: object) -> None:
        """Print nothing."""


@pytest.fixture(scope="module")
def hub() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()


CASES = [
    ("some/gated", {}, "the model is gated: accept its licence on https://huggingface.co/some/gated, then `hf auth"),
    ("some/unknown", {}, "the hub has no model of that name, or a private one; check the spelling"),
    ("some/model", {"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE keeps the hub out; run `hf download some/model` where"),
    ("some/model", {"HF_ENDPOINT": "http://127.0.0.1:9"}, "the hub cannot be reached; run `hf download some/model`"),
]  # fmt: skip
ALL = """
import sys, time
time.sleep = lambda seconds: sys.exit(f"a request would be tried again after {seconds} s")
from longctx.errors import UserError
from longctx.data.sources import source_units
from longctx.config.data import SourceConfig
from longctx.storage.model import read_config
from longctx.storage.model_files import open_source
from pathlib import Path
name = sys.argv[1]
for call in (lambda: read_config(name), lambda: open_source(name, "base"),
             lambda: source_units("books", SourceConfig(kind="hub", name=name), Path("cache"))):
    try:
        call()
    except UserError as error:
        print(error)
"""


def python(code: str, name: str, folder: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run code with a model's name, with an empty cache in `folder` and none of this process's HF_ variables."""
    plain = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    variables = {**plain, "HF_HOME": str(folder), "HF_HUB_DOWNLOAD_TIMEOUT": "2", **environment}
    return subprocess.run(
        [sys.executable, "-c", code, name], capture_output=True, text=True, env=variables, cwd=folder, timeout=120
    )


@pytest.mark.parametrize(("name", "environment", "said"), CASES, ids=["gated", "unknown", "offline", "no network"])
def test_what_the_hub_does_not_give_is_said_with_its_remedy(hub: str, tmp_path: Path, name, environment, said):
    """A model's config.json, a model's list of files and a dataset: each says the same reason."""
    done = python(ALL, name, tmp_path, {"HF_ENDPOINT": hub, **environment})
    model, *others = done.stdout.splitlines() or [done.stderr]
    assert f"model.path={name} is no folder here, and not read from the hub: " in model
    assert said in model
    assert len(others) == 2, done.stderr
    listing, dataset = others
    assert f"base={name} is no folder here" in listing
    assert said in listing
    assert f"data.sources.books.name={name} " in dataset
    expected = said.replace("model is", "dataset is").replace("no model", "no dataset").replace("co/", "co/datasets/")
    assert expected.replace("`hf download some/model`", "`longctx data` with these settings") in dataset
    assert "data=text data.path=FOLDER" in dataset


CACHED = """
import os, sys
import huggingface_hub
requests = []
huggingface_hub.set_client_factory(lambda: requests.append("client"))
from longctx.config.model import ModelConfig
from longctx.data.tokenizer import load_tokenizer
from longctx.model.load import model_of
from longctx.storage.model_files import open_source
model = ModelConfig(path=sys.argv[1])
print(len(load_tokenizer(model, vocab_size=4096)("a ring passes keys").input_ids) > 0)
print(sum(p.numel() for p in model_of(model).parameters()) > 0)
print("model.embed_tokens.weight" in {entry["name"] for entry in open_source(model.path, "base").header(
    "model.safetensors", "base")})
print(len(requests), huggingface_hub.is_offline_mode(), os.environ["HF_HUB_OFFLINE"])
"""


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A Hugging Face cache that holds the tiny model as some/model."""
    place = tmp_path / "hub" / "models--some--model"
    shutil.copytree(TINY, place / "snapshots" / ("0" * 40))
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("0" * 40)
    return tmp_path


def test_a_cached_model_is_read_where_the_hub_cannot_be_reached(cache: Path):
    """Config, tokenizer, weights and headers come from the cache, without a request that would be tried again."""
    done = python(CACHED, "some/model", cache, {"HF_ENDPOINT": "http://127.0.0.1:9"})
    assert done.stdout.splitlines() == ["True", "True", "True", "0 True 1"], done.stderr


def test_a_cached_model_is_read_under_hf_hub_offline(cache: Path, monkeypatch: pytest.MonkeyPatch):
    """The tests run with HF_HUB_OFFLINE=1; reading headers needs no list of files from the hub then."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache / "hub"))
    source = open_source("some/model", "base")
    assert "model.embed_tokens.weight" in {entry["name"] for entry in source.header("model.safetensors", "base")}
    with pytest.raises(UserError, match="base=some/other is no folder here, and not read from the hub: it is not in"):
        open_source("some/other", "base")


def test_another_revision_is_another_model(cache: Path, monkeypatch: pytest.MonkeyPatch):
    """The id alone would leave stored results and runs of the old revision in force."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache / "hub"))
    place, found = cache / "hub/models--some--model", []
    for commit in ("0" * 40, "1" * 40):
        if not (place / "snapshots" / commit).exists():
            shutil.copytree(TINY, place / "snapshots" / commit)
        (place / "refs/main").write_text(commit)
        hub_module.revision.cache_clear()
        found.append((folder_fingerprint("some/model"), content_hashes("some/model", MODEL)))
    hub_module.revision.cache_clear()
    assert found == [(f"some/model@{digit * 40}", {"": f"some/model@{digit * 40}"}) for digit in "01"]
    assert hub_module.revision("some/unknown") == "some/unknown"


def test_a_commit_of_the_model_card_is_no_other_revision(cache: Path, monkeypatch: pytest.MonkeyPatch):
    """The cache's snapshots are links to blobs that are named by content."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache / "hub"))
    place, found = cache / "hub/models--some--model", []
    shutil.rmtree(place / "snapshots")
    blobs = {"config.json": "c" * 40, "model.safetensors": "w" * 64, "README.md": "r" * 40}
    for commit, changed in (("0" * 40, {}), ("1" * 40, {"README.md": "s" * 40}), ("2" * 40, {"config.json": "d" * 40})):
        (place / "snapshots" / commit).mkdir(parents=True)
        for file, blob in {**blobs, **changed}.items():
            (place / "blobs").mkdir(exist_ok=True)
            (place / "blobs" / blob).write_text(blob)
            (place / "snapshots" / commit / file).symlink_to(f"../../blobs/{blob}")
        (place / "refs/main").write_text(commit)
        hub_module.revision.cache_clear()
        found.append(hub_module.revision("some/model"))
    hub_module.revision.cache_clear()
    assert found[0] == found[1] != found[2]


def test_a_run_goes_on_with_the_revision_of_its_start():
    kept, now, unknown = ({"model.path": {"": f"some/model{end}"}} for end in ("@" + "0" * 40, "@" + "1" * 40, ""))
    words = [change.words for change in identity.other_files(kept, now)]
    assert words == [
        f"model.path is {now['model.path']['']} on the hub now, and was some/model@{'0' * 40} at the start"
    ]
    assert not list(identity.other_files(unknown, now)) + list(identity.other_files(kept, unknown))
    folder = {"model.path": {"config.json": "hash"}}
    assert [change.key for change in identity.other_files(kept, folder)] == ["model.path"]


def reachable(monkeypatch: pytest.MonkeyPatch, endpoint: str, **proxies: str) -> bool:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    for name, value in proxies.items():
        monkeypatch.setenv(name, value)
    return hub_module._reachable(endpoint)


def test_the_hub_can_be_reached_where_it_or_its_proxy_accepts_a_connection(hub: str, monkeypatch: pytest.MonkeyPatch):
    closed = "http://127.0.0.1:9"
    assert reachable(monkeypatch, hub)
    assert not reachable(monkeypatch, closed)
    assert reachable(monkeypatch, "https://no.such.host.invalid", https_proxy=hub)
    assert not reachable(monkeypatch, hub, http_proxy=closed)
    assert reachable(monkeypatch, hub, http_proxy=closed, no_proxy="127.0.0.1")


def test_a_hub_that_answers_nothing_is_given_up(monkeypatch: pytest.MonkeyPatch):
    """A full queue of connections makes the kernel drop further ones, as a firewall does."""
    monkeypatch.setattr(hub_module, "CONNECT_SECONDS", 0.2)
    with socket.socket() as full, socket.socket() as first, socket.socket() as second:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        for waiting in (first, second):
            waiting.setblocking(False)
            waiting.connect_ex(full.getsockname())
        assert not reachable(monkeypatch, f"http://127.0.0.1:{full.getsockname()[1]}")


def test_child_processes_inherit_that_the_hub_cannot_be_reached(monkeypatch: pytest.MonkeyPatch):
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", hub_module._UNREACHABLE):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    hub_module.offline.cache_clear()
    assert hub_module.offline()
    assert (os.environ.pop("HF_HUB_OFFLINE"), os.environ.pop(hub_module._UNREACHABLE)) == ("1", "1")
    hub_module.offline.cache_clear()


def test_a_hub_with_addresses_that_swallow_packets_is_reached_at_another(monkeypatch: pytest.MonkeyPatch):
    """As where IPv6 is set up and leads nowhere: the first two addresses are listeners whose queues are full."""
    with ExitStack() as stack:
        names = ("127.0.0.2", "127.0.0.3", "127.0.0.1")
        port = 0
        for name in names:
            listener = stack.enter_context(socket.socket())
            listener.bind((name, port))
            port = listener.getsockname()[1]
            listener.listen(5 if name == names[-1] else 0)
            for _ in range(0 if name == names[-1] else 4):
                waiting = stack.enter_context(socket.socket())
                waiting.setblocking(False)
                waiting.connect_ex((name, port))
        found = socket.getaddrinfo

        def several(host: str, *words: object, **others: object) -> list:
            asked = names if host == "hub.example" else (host,)
            return [entry for name in asked for entry in found(name, *words, **others)]  # type: ignore[arg-type]

        monkeypatch.setattr(socket, "getaddrinfo", several)
        monkeypatch.setattr(hub_module, "getproxies", dict)
        assert hub_module._reachable(f"http://hub.example:{port}")
