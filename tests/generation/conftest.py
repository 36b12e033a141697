"""A release with random weights, in which everything has an effect."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gptface_dist import release
from gptface_dist.generation import Generator
from tests.release.factories import OPTIONS, make_model, make_tokenizers


@pytest.fixture(scope="session")
def release_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of 8 pixels, 4x4 codes of 16; texts of at most 64 tokens."""
    folder = tmp_path_factory.mktemp("generation")
    vocabulary = make_tokenizers(folder / "tokenizers")
    release.save(make_model(vocabulary, replace(OPTIONS, text_positions=67)), folder / "tokenizers", folder / "release", (4, 4))
    return folder / "release"


@pytest.fixture(scope="session")
def generator(release_folder: Path) -> Iterator[Generator]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield Generator.from_pretrained(release_folder)
    torch.set_num_threads(threads)
