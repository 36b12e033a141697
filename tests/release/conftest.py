"""One pair of tokenizers for all tests of releases: training them takes longer than anything else here."""

import os
from pathlib import Path

import pytest

from tests.release.factories import make_tokenizers


@pytest.fixture(autouse=True)
def in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flushing dozens of small files takes minutes on a busy disk, and no test here pulls the plug."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture(scope="session")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizers")
    make_tokenizers(folder)
    return folder
