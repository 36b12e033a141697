"""Tracking with mlflow: one mlflow run, written by rank 0 and continued when the run resumes."""

import functools
import logging
import os
from collections import defaultdict
from pathlib import Path
from typing import Any

import yaml

from gptface_dist.errors import UserError, first_line
from gptface_dist.files import write_atomically
from gptface_dist.training import run_folder
from gptface_dist.training.callbacks.callback import Callback
from gptface_dist.training.callbacks.outbox import Outbox, Rejected
from gptface_dist.training.metrics import NAME, read_metrics
from gptface_dist.training.options import TrackingOptions
from gptface_dist.training.trainer import Trainer
from gptface_dist.training.versions import versions

RUN_ID = "mlflow-run-id"
"""File in the run's folder with the mlflow run's id; exists from the start, also for runs without a checkpoint."""

MOST_METRICS = 1000
"""Largest number of metrics in one mlflow request."""


class Tracking(Callback):
    """Logs configuration, versions and metrics to mlflow, in a thread: a server that is slow or gone delays no step."""

    def __init__(self, options: TrackingOptions):
        self._options = options
        self._outbox: Outbox | None = None
        self._values: dict[str, list[float]] = defaultdict(list)
        self._status = "FAILED"

    def start(self, run: Trainer) -> None:
        """Refuse the run where mlflow is not installed."""
        if run.rank_info.rank or not self._options.mlflow:
            return
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        try:
            import mlflow
        except ImportError:
            raise UserError("mlflow is not installed: install gptface_dist[train], or set tracking.mlflow=false") from None
        del mlflow

    def begin(self, run: Trainer) -> None:
        """Create the mlflow run, or continue the one of :data:`RUN_ID`."""
        if run.rank_info.rank or not self._options.mlflow:
            return
        uri = self._options.uri or f"sqlite:///{run.folder.resolve() / 'mlflow.db'}"
        self._outbox = Outbox(f"mlflow at {uri}")
        config, parameters = run_folder.resolved(run.config), run.parameters
        self._client = _Client(uri, run.folder, self._options, config | {"parameters": parameters})
        self._outbox.put(self._client.open)
        # The steps of a window that the run had begun before it resumed.
        first = run.state.step - run.state.step % self._options.interval
        if first < run.state.step and (run.folder / NAME).exists():
            for metrics in read_metrics(run.folder):
                if metrics["step"] > first:
                    self._add({key: value for key, value in metrics.items() if key not in ("step", "kind")})

    def _add(self, metrics: dict[str, float]) -> None:
        for key, value in metrics.items():
            self._values[key].append(value)

    def after_step(self, run: Trainer, metrics: dict[str, float]) -> None:
        """Log the means over the steps since the last multiple of ``tracking.interval``."""
        if self._outbox is None:
            return
        self._add(metrics)
        if run.state.step % self._options.interval == 0 or run.state.step == run.config.run.steps:
            self._log("train", run.state.step, {key: sum(values) / len(values) for key, values in self._values.items()})
            self._values.clear()

    def after_evaluation(self, run: Trainer, metrics: dict[str, float]) -> None:
        """Log held-out metrics under ``held_out/``."""
        self._log("held_out", run.state.step, metrics)

    def _log(self, kind: str, step: int, metrics: dict[str, float]) -> None:
        if self._outbox is not None:
            from mlflow.utils.time import get_current_time_millis

            self._outbox.put(functools.partial(self._client.log, kind, step, dict(metrics), get_current_time_millis()))

    def stop(self, run: Trainer) -> None:
        """Set the status: FINISHED after all steps, KILLED after an early stop."""
        self._status = "FINISHED" if run.state.step >= run.config.run.steps else "KILLED"

    def close(self, run: Trainer) -> None:
        """End the mlflow run; its status is FAILED unless :meth:`stop` was called."""
        if self._outbox is not None:
            self._outbox.put(functools.partial(self._client.end, self._status))
            self._outbox.close(f"{run.folder / NAME} has all metrics")


class _Client:
    """What the thread of the outbox does with mlflow."""

    def __init__(self, uri: str, folder: Path, options: TrackingOptions, parameters: dict[str, Any]):
        self._uri, self._folder, self._options, self._parameters = uri, folder, options, parameters
        self._last: dict[str, int] = {}
        """By kind, the last step that mlflow has: a resumed run repeats steps."""
        self._run = ""

    def open(self) -> None:
        """Create or continue the mlflow run, and keep the configuration as an artifact."""
        import mlflow

        # They log a line for each table of a new database.
        for name in ("mlflow", "alembic"):
            logging.getLogger(name).setLevel(logging.WARNING)
        self._client: Any = mlflow.MlflowClient(self._uri)
        id_file = self._folder / RUN_ID
        if not self._run and id_file.exists():
            self._run = id_file.read_text(encoding="utf-8").strip()
            for kind in ("train", "held_out"):
                points = self._client.get_metric_history(self._run, f"{kind}/loss")
                self._last[kind] = max((point.step for point in points), default=0)
            self._client.update_run(self._run, status="RUNNING")
        elif not id_file.exists():
            # It is tried again where it fails half-way: with the same mlflow run.
            self._run = self._run or self._create()
            for key, value in _flat(self._parameters):
                self._client.log_param(self._run, key, value)
            write_atomically(id_file, self._run + "\n")
        self._client.log_artifact(self._run, str(self._folder / run_folder.NAME))

    def _create(self) -> str:
        name = self._options.experiment
        existing = self._client.get_experiment_by_name(name)
        location = None if self._options.uri else (self._folder.resolve() / "mlflow-artifacts").as_uri()
        experiment = existing.experiment_id if existing else self._client.create_experiment(name, artifact_location=location)
        created = self._client.create_run(experiment, run_name=self._options.name or self._folder.name, tags=versions())
        run_id: str = created.info.run_id
        return run_id

    def log(self, kind: str, step: int, metrics: dict[str, float], time_ms: int) -> None:
        """Add a point to each metric, unless mlflow has it from before the run resumed."""
        from mlflow.entities import Metric
        from mlflow.exceptions import MlflowException

        if step <= self._last.get(kind, 0):
            return
        points = [Metric(f"{kind}/{key}", value, time_ms, step) for key, value in metrics.items()]
        try:
            for start in range(0, len(points), MOST_METRICS):
                self._client.log_batch(self._run, points[start : start + MOST_METRICS])
        except MlflowException as error:
            if error.error_code == "INVALID_PARAMETER_VALUE":
                raise Rejected(first_line(error)) from None
            raise

    def end(self, status: str) -> None:
        """Set the final status."""
        self._client.set_terminated(self._run, status)


def _flat(config: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested keys joined by dots, values as YAML in one line, truncated to mlflow's limit."""
    pairs = []
    for key, value in config.items():
        if isinstance(value, dict):
            pairs += _flat(value, f"{prefix}{key}.")
        else:
            text = yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix("\n...\n").strip()
            pairs.append((f"{prefix}{key}", text[:6000]))
    return pairs
