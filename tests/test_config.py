"""Configuration: YAML and overrides become dataclasses, and every mistake names its file and key."""

from pathlib import Path

import pytest

from gptface_dist.config import load_config
from gptface_dist.errors import UserError
from gptface_dist.training.config import Config

GOOD = """
data:
  tokenizers: out/tokenizers
  sources:
    - {path: out/a}
    - {path: out/b, weight: 2}
  order: {seed: 5}
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "run.yaml"
    file.write_text(GOOD)
    return file


def test_reads_files_and_overrides(path: Path) -> None:
    data = load_config(Config, path, ["data.order.block=4", "data.workers=0", "data.order.block=2"]).data
    assert [(source.path, source.weight) for source in data.sources] == [("out/a", 1.0), ("out/b", 2.0)]
    assert (data.order.seed, data.order.block, data.workers) == (5, 2, 0)
    assert data.masking.text_ratio == 0.15


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.order.blok=4", r"key data\.order\.blok: .*Did you mean: 'block'"),
        ("data.order.block=x", r"key data\.order\.block: Value 'x'"),
        ("data.workers=", r"key data\.workers"),
        ("data.sources=3", r"key data\.sources"),
        ("block", "not of the form key=value"),
        ("data.masking.text_ratio=3", "text_ratio must be above 0"),
    ],
)
def test_mistakes_name_the_key(path: Path, override: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load_config(Config, path, [override])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"), [("- 1\n", "is a list"), ("a: [1\n", "is not YAML"), ("data: {}\n", "missing mandatory")]
)
def test_unusable_files(path: Path, text: str, message: str) -> None:
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        load_config(Config, path, [])


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.yaml cannot be read"):
        load_config(Config, tmp_path / "none.yaml", [])


@pytest.mark.parametrize("path", sorted((Path(__file__).parents[1] / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_configuration_of_ours_loads(path: Path) -> None:
    """With the keys of this version, whatever their values."""
    assert load_config(Config, path, []).run.steps > 0
