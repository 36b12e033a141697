"""The commands and the Python of docs/generation.md run as printed there."""

import shlex
from pathlib import Path

import pytest

from gptface_dist.generation import Generator
from tests.program import gptface

DOCS = Path(__file__).parents[2] / "docs" / "generation.md"


def first_block(start: str) -> list[str]:
    """The lines of the first indented block that begins with ``start``."""
    blocks = [block.splitlines() for block in DOCS.read_text().split("\n\n")]
    lines = [line for block in blocks if block[0].startswith("    ") for line in block]
    first = next(number for number, line in enumerate(lines) if line.startswith("    " + start))
    return [line[4:] for line in lines[first:]]


@pytest.fixture
def at(tmp_path: Path, release_folder: Path, generator: Generator, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with ``out/release`` and ``face.png``."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "release").symlink_to(release_folder)
    generator.generate("a hat")[0].image.save(tmp_path / "face.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_commands(at: Path) -> None:
    commands = [line for line in first_block("gptface generate") if line.startswith("gptface ")][:6]
    assert [command.split()[1] for command in commands] == ["generate", "edit", "caption", "score", "generate", "edit"]
    for command in commands:
        status, _, error = gptface(*shlex.split(command)[1:])
        assert status == 0, (command, error)
    assert (at / "faces.png").is_file()
    assert (at / "edited.png").is_file()


def test_python(at: Path) -> None:
    lines = first_block("from gptface_dist.generation")
    stop = next(number for number, line in enumerate(lines) if line.startswith("generator.score")) + 1
    exec("\n".join(lines[:stop]), {})
    assert (at / "face.png").is_file()
