"""``gptface train`` as a user runs it: one process, and a pipeline under ZeRO-3, on the same small corpus."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
import yaml

from gptface_dist.data.options import DataConfig, SourceConfig
from gptface_dist.data.stream import StreamOptions
from gptface_dist.objectives.milm_itm import MilmItm
from gptface_dist.sequence import IGNORE
from gptface_dist.training.data import batch_loader
from gptface_dist.training.metrics import NAME, read_metrics
from gptface_dist.training.schedule import ScheduleOptions
from tests.corpus import VOCABULARY, write_tokens
from tests.sockets import run_and_watch

STEPS = 5
GLOBAL, MICRO, BLOCK = 16, 4, 4


def config(folder: Path) -> dict[str, Any]:
    return {
        "model": {"layers": 2, "hidden": 32, "heads": 2, "ffn": 48, "text_positions": 51, "rows": 4, "columns": 6},
        "data": {
            "tokenizers": str(folder / "tokenizers"),
            "sources": [{"path": str(folder / "tokens")}],
            "global_batch": GLOBAL,
            "micro_batch": MICRO,
            "order": {"block": BLOCK, "streams": 2},
            "batch": {"text_length": 40},
            "workers": 0,
        },
        "layout": {"zero": 1},
        "schedule": {"warmup_steps": 2, "name": "linear"},
        "run": {"steps": STEPS, "log_every": 1},
        "evaluation": {"sources": [{"path": str(folder / "held_out")}], "interval": 3, "batches": 2},
    }


def train(folder: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    """A run to its end. Whatever it does, it listens on loopback alone."""
    command = [sys.executable, "-m", "gptface_dist.tools.main", "train", str(folder / "run.yaml"), *overrides]
    done, addresses = run_and_watch(command, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert addresses <= {"127.0.0.1"}
    return done


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("train")
    write_tokens(folder / "tokens", [60, 50])
    write_tokens(folder / "held_out", [40], seed=1)
    (folder / "tokenizers").mkdir()
    VOCABULARY.save(folder / "tokenizers" / "vocabulary.json")
    (folder / "run.yaml").write_text(yaml.safe_dump(config(folder)))
    return folder


@pytest.fixture(scope="module")
def alone(folder: Path) -> Path:
    done = train(folder, f"run.folder={folder / 'alone'}")
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    assert done.stdout == ""
    return folder / "alone"


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> Path:
    done = train(folder, f"run.folder={folder / 'pipeline'}", "layout.pp=2", "layout.zero=3", "tracking.mlflow=false")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count(f"step {STEPS}/{STEPS}") == 1, "one rank speaks"
    return folder / "pipeline"


def test_a_pipeline_learns_what_one_process_learns(alone: Path, pipeline: Path) -> None:
    for kind, names in (("train", ["loss", "grad_norm", "loss/text", "loss/image", "loss/itm"]), ("evaluation", ["loss"])):
        one, two = read_metrics(alone, kind), read_metrics(pipeline, kind)
        assert [record["step"] for record in one] == [record["step"] for record in two]
        for a, b in zip(one, two, strict=True):
            assert [a[name] for name in names] == pytest.approx([b[name] for name in names], rel=2e-5)
    assert read_metrics(alone)[-1]["loss"] < read_metrics(alone)[0]["loss"]


def test_the_journal_has_every_step(alone: Path, folder: Path) -> None:
    records = read_metrics(alone)
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    schedule = ScheduleOptions("linear", warmup_steps=2)
    assert [record["lr"] for record in records] == pytest.approx([1e-3 * schedule.factor(s, STEPS) for s in range(STEPS)])
    assert [record["step"] for record in read_metrics(alone, "evaluation")] == [3, STEPS]
    for record in records:
        parts = sum(record[f"seconds/{part}"] for part in ("data", "forward_backward", "optimizer"))
        assert record["seconds"] == pytest.approx(parts)
        assert record["tokens_per_s"] == pytest.approx(record["tokens"] / record["seconds"])
        assert record["loss"] == pytest.approx(sum(record[f"loss/{name}"] for name in ("text", "image", "itm")))
        assert "mfu" not in record, "the peak of a CPU is not known"


def held_out(folder: Path, source: str) -> Any:
    from gptface_dist.data.batch import BatchOptions

    options = DataConfig(
        str(folder / "tokenizers"),
        [SourceConfig(str(folder / source))],
        GLOBAL,
        MICRO,
        StreamOptions(block=BLOCK, streams=2),
        batch=BatchOptions(text_length=40),
        workers=0,
    )
    return batch_loader(options, MilmItm())


def test_tokens_are_counted_without_padding(alone: Path, folder: Path) -> None:
    loader = held_out(folder, "tokens")
    counted = [sum(int(batch.lengths.sum()) for batch in loader.read(step)[0]) for step in range(STEPS)]
    assert [record["tokens"] for record in read_metrics(alone)] == counted


def test_the_constant_guess_is_the_entropy_of_the_targets(alone: Path, folder: Path) -> None:
    loader = held_out(folder, "held_out")
    labels = np.concatenate([batch.labels[batch.labels != IGNORE] for step in range(2) for batch in loader.read(step)[0]])
    for name, ids in (("text", VOCABULARY.text_range), ("image", VOCABULARY.image_range)):
        _, counts = np.unique(labels[(labels >= ids.start) & (labels < ids.stop)], return_counts=True)
        shares = counts / counts.sum()
        for record in read_metrics(alone, "evaluation"):
            assert record[f"constant_guess/{name}"] == pytest.approx(-(shares * np.log(shares)).sum())


def test_mlflow_has_one_run_with_configuration_versions_and_metrics(alone: Path, folder: Path) -> None:
    client = mlflow.MlflowClient(f"sqlite:///{alone / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("gptface")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.params["model.hidden"] == "32"
    assert run.data.params["data.sources"] == f"[{{path: {folder / 'tokens'}, weight: 1.0}}]"
    assert {"torch", "deepspeed", "gptface_dist"} <= set(run.data.tags)
    losses = [record["loss"] for record in read_metrics(alone)]
    # tracking.interval is more than the run's steps: one mean over all of them.
    (metric,) = client.get_metric_history(run.info.run_id, "train/loss")
    assert metric.value == pytest.approx(np.mean(losses))
    assert [m.step for m in client.get_metric_history(run.info.run_id, "held_out/loss")] == [3, STEPS]
    assert [artifact.path for artifact in client.list_artifacts(run.info.run_id)] == ["config.yaml"]


def test_mistakes_are_one_line_and_change_nothing(alone: Path, folder: Path) -> None:
    """One process, two, and one that more than two would be needed for; test_run.py has all other mistakes."""
    before = {path: path.stat().st_mtime_ns for path in alone.rglob("*")}
    other = f"data.sources=[{{path: {folder / 'held_out'}}}]"
    for overrides, message in (
        (["data.sources=[]"], "data.sources is empty"),
        (["layout.tp=3", "layout.pp=2"], "multiple of tp 3"),
        (["layout.dp=2", "run.steps=10", other], "other data"),
    ):
        done = train(folder, f"run.folder={alone}", *overrides)
        assert done.returncode == 2
        (line,) = done.stderr.splitlines()
        assert line.startswith("gptface: ")
        assert message in line
        assert {path: path.stat().st_mtime_ns for path in alone.rglob("*")} == before


def test_a_loss_that_is_no_number_ends_all_ranks(folder: Path) -> None:
    overrides = ["optimizer.lr=1e30", "optimizer.max_grad_norm=0", "layout.pp=2", "layout.zero=3", "tracking.mlflow=false"]
    done = train(folder, f"run.folder={folder / 'nan'}", *overrides)
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("gptface: ")]
    assert "loss" in line
    assert "nan" in line
    assert json.loads((folder / "nan" / NAME).read_text().splitlines()[-1])["step"] == 1
