"""A run as ``gptface train`` does it, in one process that does many: what refuses it, what must not end it, what it keeps."""

import contextlib
import dataclasses
import errno
import hashlib
import io
import json
import logging
import os
import shutil
import sqlite3
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, TextIO

import mlflow
import pytest
import torch
import torch.distributed as dist
import yaml
from torch.distributed import distributed_c10d

from gptface_dist.checkpoint.folder import FOLDER_NAME, name_of, published, step_of
from gptface_dist.distributed.rank import RankInfo
from gptface_dist.distributed.spawn import spawn
from gptface_dist.distributed.watchdog import Watchdog
from gptface_dist.errors import UserError
from gptface_dist.folder_lock import FolderLock
from gptface_dist.parallel import libraries
from gptface_dist.training.callbacks import metrics_logger, outbox, tracking
from gptface_dist.training.callbacks.checkpointing import Checkpointing
from gptface_dist.training.metrics import NAME, read_metrics
from gptface_dist.training.trainer import Trainer
from tests.corpus import VOCABULARY, write_tokens
from tests.training.test_train import config

Scenario = Callable[[Path], object]
SCENARIOS: list[Scenario] = []
STEPS = 3
"""Of the run that starts are refused in: it could go on to twice as many."""


def scenario(function: Scenario) -> Scenario:
    """Do it in the spawned process."""
    SCENARIOS.append(function)
    return function


class _Ended(BaseException):
    def __init__(self, status: int):
        super().__init__()
        self.status = status


def _end(watchdog: Watchdog, message: str, status: int) -> NoReturn:
    """As the watchdog does, in a process that goes on."""
    for work in watchdog._at_end:
        work()
    watchdog._ended.set()
    raise _Ended(status)


def train(folder: Path, *overrides: str, to: TextIO | None = None) -> tuple[int, str]:
    """Status of ``gptface train``, and its standard error if that goes not ``to`` a file."""
    from megatron.core import parallel_state

    from gptface_dist.parallel import groups
    from gptface_dist.tools.train import train as command

    errors, status = io.StringIO(), 0
    # Handlers of logging keep the stream that they were made with.
    handler = logging.StreamHandler(errors)
    logging.getLogger("gptface_dist").addHandler(handler)
    try:
        with contextlib.redirect_stderr(to or errors):
            command(folder / "run.yaml", list(overrides))
    except UserError as error:
        status = 2
        errors.write(f"gptface: {error}\n")
    except _Ended as ended:
        status = ended.status
    finally:
        logging.getLogger("gptface_dist").removeHandler(handler)
        parallel_state.destroy_model_parallel()
        if dist.is_initialized():
            groups.stop()
    return status, errors.getvalue()


def snapshot(folder: Path) -> dict[str, tuple[str, int]]:
    """Content and time of every file in a folder; its subfolders."""
    return {
        str(path.relative_to(folder)): (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns)
        if path.is_file()
        else ("folder", 0)
        for path in folder.rglob("*")
    }


@dataclasses.dataclass(frozen=True)
class Refusal:
    """A start in a run's folder that must be refused."""

    message: str
    """Part of the one line."""
    overrides: tuple[str, ...] = ()
    """Of the configuration; ``FOLDER`` and ``RUN`` stand for paths."""
    spoil: Callable[[Path], object] = lambda run: None
    """What was done to the run's folder before."""


def _flip(name: str, *steps: int) -> Callable[[Path], None]:
    def spoil(run: Path) -> None:
        for step in steps:
            path = run / FOLDER_NAME / name_of(step) / name
            path.write_bytes(path.read_bytes()[:-1] + b"?")

    return spoil


def _rewrite(name: str, change: Callable[[str], str]) -> Callable[[Path], None]:
    return lambda run: (run / name).write_text(change((run / name).read_text())) and None


SHARD = "state/__0_0.distcp"
REFUSALS = [
    Refusal("run.nothing", ("run.nothing=1",)),
    Refusal("zero must be one of", ("layout.zero=9",)),
    Refusal("engine.dtype must be one of", ("engine.dtype=float16",)),
    Refusal("objective", ("objective.name=nothing",)),
    Refusal("nothing/vocabulary.json does not exist", ("data.tokenizers=FOLDER/nothing",)),
    Refusal("data.sources is empty", ("data.sources=[]",)),
    Refusal("nothing", ("data.sources=[{path: FOLDER/nothing}]",)),
    Refusal("at least 43", ("model.text_positions=42",)),
    Refusal("4x6 codes", ("model.rows=3",)),
    Refusal("multiple of tp 3", ("layout.tp=3",)),
    Refusal("global_batch", ("data.global_batch=6",)),
    Refusal("at most 2 batches", ("evaluation.batches=3",)),
    Refusal("nothing", ("evaluation.sources=[{path: FOLDER/nothing}]",)),
    Refusal("nothing", ("run.init_from=FOLDER/nothing",)),
    Refusal("attention_health.fall_back", ("attention_health.interval=1", "attention_health.fall_back=0.1")),
    Refusal("optimizer.lr=0.001", ("optimizer.lr=1e-4",)),
    Refusal("model.hidden=32", ("model.hidden=16",)),
    Refusal("loss.itm=1.0", ("loss.itm=0.5",)),
    Refusal("run.seed=0", ("run.seed=1",)),
    Refusal("schedule.total_steps=6", ("schedule.total_steps=7",)),
    Refusal("schedule.warmup_steps=2", ("schedule.warmup_steps=1",)),
    Refusal("run.steps is 2, and", ("run.steps=2",)),
    Refusal("checkpoint.resume is never", ("checkpoint.resume=never",)),
    Refusal("holds no checkpoint", ("checkpoint.resume_from=FOLDER/tokens",)),
    Refusal("other data", ("data.sources=[{path: FOLDER/other}]",)),
    Refusal("other data", (f"checkpoint.resume_from=RUN/{FOLDER_NAME}/{name_of(2)}", "data.sources=[{path: FOLDER/other}]")),
    Refusal("other data", ("checkpoint.damaged=previous", "data.sources=[{path: FOLDER/other}]"), _flip(SHARD, 3)),
    Refusal("checkpoint.damaged=previous", (), _flip(SHARD, 3)),
    Refusal("is undamaged", ("checkpoint.damaged=previous",), _flip("manifest.json", 1, 2, 3)),
    Refusal("checkpoint.resume_from", (f"checkpoint.resume_from=RUN/{FOLDER_NAME}/{name_of(2)}",), _flip(SHARD, 2)),
    Refusal("of another version", (), _rewrite("config.yaml", lambda text: text.removeprefix("# "))),
    Refusal("config.yaml", (), _rewrite("config.yaml", lambda text: text + "{")),
    Refusal("metrics.jsonl", (), _rewrite(NAME, lambda text: "{}\n" + text)),
    Refusal("is in use by process", (), lambda run: FolderLock(run, "run.folder")),
]


@scenario
def refused_starts_change_nothing(folder: Path) -> None:
    """For each reason there is, in a folder that holds a run."""
    run, copy = folder / "begun", folder / "refused"
    settings = ["schedule.total_steps=6", "checkpoint.interval=1", "tracking.mlflow=false"]
    assert train(folder, f"run.folder={run}", *settings)[0] == 0
    wrong = []
    for refusal in REFUSALS:
        shutil.copytree(run, copy)
        held = refusal.spoil(copy)
        before = snapshot(copy)
        overrides = [text.replace("FOLDER", str(folder)).replace("RUN", str(copy)) for text in refusal.overrides]
        status, errors = train(folder, f"run.folder={copy}", *settings, "run.steps=6", *overrides)
        lines = [line for line in errors.splitlines() if line.startswith("gptface: ")]
        if status != 2 or len(lines) != 1 or refusal.message not in lines[0] or "Traceback" in errors:
            wrong.append(f"{refusal}: status {status}: {errors}")
        if snapshot(copy) != before:
            wrong.append(f"{refusal}: {sorted(snapshot(copy).items() ^ before.items())}")
        if isinstance(held, FolderLock):
            held.release()
        shutil.rmtree(copy)
    assert wrong == [], "\n".join(wrong)


@scenario
def refused_first_starts_leave_nothing(folder: Path) -> None:
    """The last things to be checked: the checkpoint, and the data of the first step."""
    broken = folder / "broken"
    shutil.copytree(folder / "tokens", broken)
    for shard in broken.glob("*.tar"):
        shard.write_bytes(bytes(shard.stat().st_size))
    where = f"run.folder={folder / 'new' / 'run'}"
    for overrides in (["checkpoint.resume=must"], [f"data.sources=[{{path: {broken}}}]"]):
        status, errors = train(folder, where, "tracking.mlflow=false", *overrides)
        assert status == 2, errors
        assert not (folder / "new").exists(), errors
    status, errors = train(folder, f"run.folder={folder / 'run.yaml' / 'run'}", "tracking.mlflow=false")
    assert status == 2
    assert f"run.folder {folder / 'run.yaml' / 'run'} cannot be used: Not a directory" in errors


@scenario
def a_state_that_is_not_finite_is_never_published(folder: Path) -> None:
    """AdamW without eps divides 0 by 0 where a gradient is exactly 0, as of ids that no sample has."""
    settings = ["schedule.total_steps=6", "tracking.mlflow=false"]
    for number, options in enumerate(
        (
            ["run.steps=1"],
            ["run.steps=1", "checkpoint.interval=1", "checkpoint.on_failure=go_on"],
            ["checkpoint.interval=1", "checkpoint.asynchronous=true", "run.ema_decay=0.9"],
        )
    ):
        run = folder / f"nan-{number}"
        status, errors = train(folder, f"run.folder={run}", "optimizer.eps=0", *settings, *options)
        assert status == 2, errors
        (line,) = [line for line in errors.splitlines() if line.startswith("gptface: ")]
        assert "step 1: the update made" in line, line
        assert "NaN or infinite" in line, line
        assert not list((run / FOLDER_NAME).iterdir()) if (run / FOLDER_NAME).exists() else True


@scenario
def a_run_ends_early_and_goes_on_by_the_same_schedule(folder: Path) -> None:
    """Linear from step 2 on: of 6 steps, whatever the run's own end is. Beyond them, the last step's rate stays."""
    run = folder / "longer"
    where = [f"run.folder={run}", "tracking.mlflow=false", "evaluation.sources=[]"]
    assert train(folder, *where, "run.steps=4", "schedule.total_steps=6")[0] == 0
    assert train(folder, *where, "run.steps=6")[0] == 0
    status, errors = train(folder, *where, "run.steps=8")
    assert status == 0, errors
    factors = [1 / 2, 1.0, *(0.1 + 0.9 * (1 - done / 4) for done in (1, 2, 3, 4)), 0.1, 0.1]
    assert [metrics["lr"] for metrics in read_metrics(run)] == pytest.approx([1e-3 * factor for factor in factors])
    assert yaml.safe_load((run / "config.yaml").read_text())["schedule"]["total_steps"] == 6


@scenario
def the_metrics_wait_for_a_full_disk(folder: Path) -> None:
    """Some bytes of a line still fit."""
    run, pwrite, calls = folder / "full", os.pwrite, 0

    def full(descriptor: int, data: bytes, offset: int) -> int:
        nonlocal calls
        calls += 1
        if not 2 <= calls <= 5:
            return pwrite(descriptor, data, offset)
        if calls == 2:
            return pwrite(descriptor, data[:7], offset)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics_logger.os, "pwrite", full)
        status, errors = train(folder, f"run.folder={run}", "tracking.mlflow=false", "run.steps=6", "evaluation.sources=[]")
    assert status == 0, errors
    assert errors.count("metrics.jsonl cannot be written: No space left on device") == 1
    assert errors.count("can be written again") == 1
    assert [metrics["step"] for metrics in read_metrics(run)] == [1, 2, 3, 4, 5, 6]


@scenario
def a_log_that_cannot_be_written_ends_nothing(folder: Path) -> None:
    """Standard error is a file on a full disk, or a pipe whose reader has gone."""
    run = folder / "silent"
    full = Path("/dev/full").open("w")  # noqa: SIM115 (to close it fails)
    assert train(folder, f"run.folder={run}", "tracking.mlflow=false", to=full)[0] == 0
    with contextlib.suppress(OSError):
        full.close()
    assert len(read_metrics(run)) == STEPS


@scenario
def a_locked_database_of_mlflow_ends_nothing(folder: Path) -> None:
    """Another program holds it from before the run resumes until after its end."""
    run = folder / "locked"
    assert train(folder, f"run.folder={run}", "schedule.total_steps=6")[0] == 0
    lock = sqlite3.connect(run / "mlflow.db", isolation_level=None)
    lock.execute("BEGIN EXCLUSIVE")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(outbox, "CLOSE_S", 1.0)
        status, errors = train(folder, f"run.folder={run}", "run.steps=6")
    lock.close()
    assert status == 0, errors
    assert f"mlflow at sqlite:///{run / 'mlflow.db'}: " in errors
    assert "metrics.jsonl has all metrics" in errors
    assert len(read_metrics(run)) == 6
    assert step_of(published(run / FOLDER_NAME)[0]) == 6


@scenario
def points_of_mlflow_do_not_depend_on_where_a_run_stopped(folder: Path) -> None:
    """Windows of four steps; the run stops inside of them, the second time before it has saved anything more."""

    def points(run: Path, name: str) -> list[tuple[int, float]]:
        client = mlflow.MlflowClient(f"sqlite:///{run / 'mlflow.db'}")
        history = client.get_metric_history((run / tracking.RUN_ID).read_text().strip(), name)
        return [(point.step, point.value) for point in history]

    whole, parts = folder / "whole", folder / "parts"
    settings = ["schedule.total_steps=10", "tracking.interval=4", "checkpoint.interval=5"]
    assert train(folder, f"run.folder={whole}", *settings, "run.steps=10")[0] == 0
    assert train(folder, f"run.folder={parts}", *settings, "run.steps=3")[0] == 0
    with pytest.MonkeyPatch.context() as patch:
        stopped = Checkpointing.after_step

        def stop(self: Any, run: Any, metrics: Any) -> None:
            stopped(self, run, metrics)
            if run.state.step == 9:
                raise UserError("enough")

        patch.setattr(Checkpointing, "after_step", stop)
        assert train(folder, f"run.folder={parts}", *settings, "run.steps=10")[0] == 2
    assert train(folder, f"run.folder={parts}", *settings, "run.steps=10")[0] == 0
    for name in ("train/loss", "train/loss/itm", "held_out/loss"):
        expected, found = points(whole, name), points(parts, name)
        assert len({step for step, _ in found}) == len(found), found
        assert dict(expected) == pytest.approx({step: value for step, value in found if step in dict(expected)}, rel=1e-6)
    assert [step for step, _ in points(whole, "train/loss")] == [4, 8, 10]
    assert [step for step, _ in points(parts, "train/loss")] == [3, 4, 8, 10]


@scenario
def one_time_limit_holds_for_every_group(folder: Path) -> None:
    """Of the layout, DeepSpeed's own, the checkpoints' and the default one."""
    found: dict[str, float] = {}
    evaluate = Trainer._evaluate

    def look(run: Trainer) -> None:
        for group, name in distributed_c10d._world.pg_names.items():
            backend: Any = group._get_backend(torch.device("cpu"))
            found[name] = backend.options._timeout.total_seconds()
        evaluate(run)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_evaluate", look)
        status, errors = train(folder, f"run.folder={folder / 'limit'}", "tracking.mlflow=false", "run.timeout_s=37")
    assert status == 0, errors
    assert len(found) > 5
    assert set(found.values()) == {37.0}, found


def work(_: RankInfo, folder: Path) -> None:
    """Do all scenarios; what each raised is written down."""
    with libraries.quiet_imports():
        libraries.import_libraries()
        from gptface_dist.training import run

        del run
    Watchdog._end = _end  # type: ignore[method-assign]
    results = {}
    for each in SCENARIOS:
        try:
            each(folder)
            results[each.__name__] = ""
        except BaseException:
            results[each.__name__] = traceback.format_exc()
        (folder / "results.json").write_text(json.dumps(results))


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("runs")
    for name, seed in (("tokens", 0), ("other", 2)):
        write_tokens(folder / name, [60, 50], seed=seed)
    write_tokens(folder / "held_out", [40], seed=1)
    (folder / "tokenizers").mkdir()
    VOCABULARY.save(folder / "tokenizers" / "vocabulary.json")
    settings = config(folder)
    settings["run"] = {"steps": STEPS, "log_every": 1}
    (folder / "run.yaml").write_text(yaml.safe_dump(settings))
    spawn(work, 1, folder)
    found: dict[str, str] = json.loads((folder / "results.json").read_text())
    return found


@pytest.mark.parametrize("name", [each.__name__ for each in SCENARIOS])
def test_run(results: dict[str, str], name: str) -> None:
    assert results[name] == ""
