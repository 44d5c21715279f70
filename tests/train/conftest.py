"""A folder of documents, and a run over them that nobody disturbed."""

from __future__ import annotations

from pathlib import Path

import pytest

from longctx.train.train import train

from .made import config, write_documents


@pytest.fixture(scope="session")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_documents(tmp_path_factory.mktemp("documents") / "docs")


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, documents: Path) -> Path:
    run = tmp_path_factory.mktemp("runs") / "undisturbed"
    assert train(config(run, documents)) == 0
    return run
