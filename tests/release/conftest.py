"""One pair of tokenizers for all tests of releases: training them takes longer than anything else here."""

from pathlib import Path

import pytest

from tests.release.making import make_tokenizers


@pytest.fixture(scope="session")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizers")
    make_tokenizers(folder)
    return folder
