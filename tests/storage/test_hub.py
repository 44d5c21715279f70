"""A model or dataset that the hub does not give: gated, unknown, no network, not in the cache; each with its remedy.

A server on loopback answers as the hub does (status and X-Error-Code), so that huggingface_hub's own errors are raised.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

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
import sys
from longctx.errors import UserError
from longctx.data.sources import source_units
from longctx.config.data import SourceConfig
from longctx.storage.model import read_config
from longctx.storage.model_files import open_source
from pathlib import Path
name = sys.argv[1]
for call in (lambda: read_config(name), lambda: open_source(name, "base"),
             lambda: source_units("books", SourceConfig(kind="hub", name=name), Path("cache")))[:int(sys.argv[2])]:
    try:
        call()
    except UserError as error:
        print(error)
"""


@pytest.mark.parametrize(("name", "environment", "said"), CASES, ids=["gated", "unknown", "offline", "no network"])
def test_what_the_hub_does_not_give_is_said_with_its_remedy(hub: str, tmp_path: Path, name, environment, said):
    """A model's config.json, a model's list of files and a dataset: each says the same reason."""
    plain = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    variables = {**plain, "HF_ENDPOINT": hub, "HF_HOME": str(tmp_path), "HF_HUB_DOWNLOAD_TIMEOUT": "2", **environment}
    calls = "1" if environment.get("HF_ENDPOINT") else "3"  # the others try again for half a minute and more
    done = subprocess.run(
        [sys.executable, "-c", ALL, name, calls],
        capture_output=True,
        text=True,
        env=variables,
        cwd=tmp_path,
        timeout=120,
    )
    model, *others = done.stdout.splitlines() or [done.stderr]
    assert f"model.path={name} is no folder here, and not read from the hub: " in model
    assert said in model
    assert len(others) == int(calls) - 1
    for listing in others[:1]:
        assert f"base={name} is no folder here" in listing
        assert said in listing
    for dataset in others[1:]:
        assert f"data.sources.books.name={name} " in dataset
        expected = (
            said.replace("model is", "dataset is").replace("no model", "no dataset").replace("co/", "co/datasets/")
        )
        assert expected.replace("hf download", "hf download --repo-type dataset") in dataset
        assert "data=text data.path=FOLDER" in dataset
