"""The folder of checkpoints, in the states that two kills in a row leave."""

from pathlib import Path

import pytest

from gptface_dist.checkpoint.folder import FOLDER_NAME, LATEST_NAME, latest, name_of, published, tidy
from tests.checkpoint.fake_state import read, tiny, write


@pytest.fixture
def checkpoints(tmp_path: Path) -> Path:
    """A first checkpoint, of ones at step 1."""
    write(tmp_path, tiny(1.0), 1)
    return tmp_path / FOLDER_NAME


def test_the_first_checkpoint_reached_again_before_the_pointer_was_written(tmp_path: Path, checkpoints: Path) -> None:
    """Killed before the pointer, begun again, and killed there again: the new one is the latest, and saving works."""
    (checkpoints / name_of(1)).rename(checkpoints / f".{name_of(1)}.old")
    (checkpoints / LATEST_NAME).unlink()
    write(tmp_path / "other", tiny(2.0), 1)
    (tmp_path / "other" / FOLDER_NAME / name_of(1)).rename(checkpoints / name_of(1))
    found = latest(checkpoints)
    assert found is not None
    assert read(found, tiny(0.0)).equals(tiny(2.0))
    tidy(checkpoints)
    assert (checkpoints / LATEST_NAME).read_text().startswith(f"{name_of(1)} ")
    assert sorted(path.name for path in checkpoints.iterdir()) == [LATEST_NAME, name_of(1)]
    write(tmp_path, tiny(3.0), 2)
    assert [path.name for path in published(checkpoints)] == [name_of(2), name_of(1)]


def test_put_aside_and_killed_again_while_clearing(tmp_path: Path, checkpoints: Path) -> None:
    """The only checkpoint stands aside, and what should have replaced it is half deleted: it is still the latest."""
    (checkpoints / name_of(1)).rename(checkpoints / f".{name_of(1)}.old")
    gone = checkpoints / f".{name_of(1)}.gone" / "state"
    gone.mkdir(parents=True)
    (gone / ".metadata").write_bytes(b"half")
    found = latest(checkpoints)
    assert found is not None
    assert read(found, tiny(0.0)).equals(tiny(1.0))
    assert not published(checkpoints)
    tidy(checkpoints)
    assert sorted(path.name for path in checkpoints.iterdir()) == [LATEST_NAME, name_of(1)]
    assert read(checkpoints / name_of(1), tiny(0.0)).equals(tiny(1.0))
