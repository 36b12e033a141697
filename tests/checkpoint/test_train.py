"""``gptface train`` killed in the middle and started again, on another layout: data, masks and losses go on exactly."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from gptface_dist.checkpoint.folder import FOLDER_NAME, latest, published, step_of
from gptface_dist.checkpoint.load import damage
from gptface_dist.distributed.collectives import RankGroup
from gptface_dist.training.metrics import read_metrics
from tests.corpus import VOCABULARY, write_tokens
from tests.training.test_train import config

STEPS = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("train")
    write_tokens(folder / "tokens", [60, 50])
    (folder / "tokenizers").mkdir()
    VOCABULARY.save(folder / "tokenizers" / "vocabulary.json")
    settings = config(folder) | {
        "schedule": {"warmup_steps": 0, "name": "constant"},
        "run": {"steps": STEPS, "log_every": 1},
        "tracking": {"mlflow": False},
        "checkpoint": {"interval": 2, "keep_last": 2},
        "evaluation": {},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(settings))
    return folder


def start(folder: Path, name: str, *overrides: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "gptface_dist.tools.main", "train", str(folder / "run.yaml")]
    return subprocess.Popen(
        [*command, f"run.folder={folder / name}", *overrides],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )


def test_killed_and_gone_on_with_elsewhere(folder: Path) -> None:
    whole = start(folder, "whole")
    assert whole.wait(300) == 0, whole.stderr and whole.stderr.read()

    checkpoints = folder / "killed" / FOLDER_NAME
    killed = start(folder, "killed", "checkpoint.asynchronous=true")
    while killed.poll() is None and not published(checkpoints):
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.wait(60)
    found = latest(checkpoints)
    assert found is not None
    assert damage(found, RankGroup()) == ""

    resumed = start(folder, "killed", "layout.pp=2", "layout.zero=3")
    assert resumed.wait(300) == 0, resumed.stderr and resumed.stderr.read()
    assert resumed.stderr
    assert f"from step {step_of(found)}" in resumed.stderr.read()
    one, two = read_metrics(folder / "whole"), read_metrics(folder / "killed")
    assert [record["step"] for record in two] == list(range(1, STEPS + 1))
    for a, b in zip(one, two, strict=True):
        assert {name: a[name] for name in ("tokens", "lr")} == {name: b[name] for name in ("tokens", "lr")}
        assert [a[name] for name in ("loss", "grad_norm")] == pytest.approx(
            [b[name] for name in ("loss", "grad_norm")], rel=2e-5
        )
    assert [step_of(path) for path in published(checkpoints)] == [STEPS, STEPS - 2]
