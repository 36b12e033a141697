"""A run that starts from a release has exactly its weights, on any layout."""

from pathlib import Path

import pytest
import torch
import yaml

from gptface_dist.model.options import ModelOptions
from gptface_dist.release.writer import save
from tests.checkpoint.job_pool import tensors
from tests.corpus import GRID, write_tokens
from tests.release.factories import make_model, make_tokenizers
from tests.training.test_train import config, train


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("init")
    vocabulary = make_tokenizers(folder / "tokenizers")
    write_tokens(folder / "tokens", [40], vocabulary=vocabulary)
    settings = config(folder) | {
        "run": {"steps": 1},
        "schedule": {"warmup_steps": 0},
        "tracking": {"mlflow": False},
        "evaluation": {},
    }
    save(make_model(vocabulary, ModelOptions(**settings["model"])), folder / "tokenizers", folder / "release", GRID)
    # Weights that a step leaves as they are.
    settings |= {"optimizer": {"lr": 0.0}}
    settings["run"] |= {"init_from": str(folder / "release"), "seed": 7}
    (folder / "run.yaml").write_text(yaml.safe_dump(settings))
    return folder


@pytest.mark.parametrize("layout", [["layout.zero=0"], ["layout.tp=2", "layout.zero=3"]])
def test_the_weights_are_the_releases(folder: Path, tmp_path: Path, layout: list[str]) -> None:
    done = train(folder, f"run.folder={tmp_path / 'run'}", *layout)
    assert done.returncode == 0, done.stderr
    from gptface_dist import release

    wanted = dict(release.load(folder / "release").model.named_parameters())
    found = tensors(tmp_path / "run" / "checkpoints", 1)
    assert {f"weights/{name}" for name in wanted} == {key for key in found if key.startswith("weights/")}
    for name, parameter in wanted.items():
        assert torch.equal(found[f"weights/{name}"], parameter.detach()), name
    assert any(found[key].abs().max() > 0 for key in found if key.startswith("exp_avg/")), "there were gradients"


def test_another_model_is_refused(folder: Path, tmp_path: Path) -> None:
    done = train(folder, f"run.folder={tmp_path / 'run'}", "model.ffn=64")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "run.init_from" in line
    assert "model.ffn is 64, the release's is 48" in line
    assert not (tmp_path / "run").exists()
