"""The folder of a run: whose it is, and of which version."""

from dataclasses import replace
from pathlib import Path

import pytest

from gptface_dist.config import load_config
from gptface_dist.data.options import DataConfig
from gptface_dist.errors import UserError
from gptface_dist.training.config import Config
from gptface_dist.training.options import RunOptions
from gptface_dist.training.run_folder import HEADER, NAME, settled, write_config


def config(folder: Path, **options: object) -> Config:
    return Config(DataConfig("tokenizers", []), run=RunOptions(folder=str(folder)), **options)  # type: ignore[arg-type]


def test_the_whole_configuration_is_written_and_can_be_read_again(tmp_path: Path) -> None:
    made = config(tmp_path / "run", loss={"itm": 0.5})
    write_config(made)
    write_config(made)
    assert load_config(Config, tmp_path / "run" / NAME, []) == settled(made)
    assert made.loss == {"text": 1.0, "image": 1.0, "itm": 0.5}


def test_another_run_is_refused_and_nothing_overwritten(tmp_path: Path) -> None:
    write_config(config(tmp_path / "run"))
    before = (tmp_path / "run" / NAME).read_text()
    with pytest.raises(UserError, match=r"holds a run with loss\.itm=1\.0, this one has 0\.5"):
        write_config(config(tmp_path / "run", loss={"itm": 0.5}))
    assert (tmp_path / "run" / NAME).read_text() == before
    # What does not make a run what it is may change.
    write_config(replace(config(tmp_path / "run"), run=RunOptions(folder=str(tmp_path / "run"), log_every=3)))


def test_a_run_of_an_earlier_version_is_refused_in_one_line(tmp_path: Path) -> None:
    write_config(config(tmp_path / "run"))
    path = tmp_path / "run" / NAME
    earlier = path.read_text().removeprefix(HEADER + "\n")
    path.write_text(earlier)
    with pytest.raises(UserError, match="it is of another version of gptface_dist") as error:
        write_config(config(tmp_path / "run"))
    assert "\n" not in str(error.value)
    assert path.read_text() == earlier
