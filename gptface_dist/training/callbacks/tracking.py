"""Tracking with mlflow: one mlflow run, written by rank 0 and continued when the run resumes."""

import logging
import os
from collections import defaultdict
from typing import Any

import yaml

from gptface_dist.errors import UserError
from gptface_dist.files import write_atomically
from gptface_dist.training import run_folder
from gptface_dist.training.callbacks.callback import Callback
from gptface_dist.training.options import TrackingOptions
from gptface_dist.training.trainer import Trainer
from gptface_dist.training.versions import versions

RUN_ID = "mlflow-run-id"
"""File in the run's folder with the mlflow run's id; exists from the start, also for runs without a checkpoint."""

MOST_METRICS = 1000
"""Largest number of metrics in one mlflow request."""


class Tracking(Callback):
    """Logs configuration, versions and metrics to mlflow."""

    def __init__(self, options: TrackingOptions):
        self._options = options
        self._client: Any = None
        self._run = ""
        self._values: dict[str, list[float]] = defaultdict(list)
        self._status = "FAILED"

    def start(self, run: Trainer) -> None:
        """Create the mlflow run, or continue the one of :data:`RUN_ID`."""
        if run.rank_info.rank or not self._options.mlflow:
            return
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        try:
            import mlflow
        except ImportError:
            raise UserError("mlflow is not installed: install gptface_dist[train], or set tracking.mlflow=false") from None
        # They log a line for each table of a new database.
        for name in ("mlflow", "alembic"):
            logging.getLogger(name).setLevel(logging.WARNING)
        uri = self._options.uri or f"sqlite:///{run.folder.resolve() / 'mlflow.db'}"
        id_file = run.folder / RUN_ID
        try:
            self._client = mlflow.MlflowClient(uri)
            self._run = id_file.read_text(encoding="utf-8").strip() if id_file.exists() else ""
            if self._run:
                self._client.update_run(self._run, status="RUNNING")
            else:
                self._run = self._new_run(run)
                write_atomically(id_file, self._run + "\n")
            self._client.log_artifact(self._run, str(run.folder / run_folder.NAME))
        except mlflow.exceptions.MlflowException as error:
            raise UserError(f"mlflow at {uri}: {str(error).splitlines()[0]}; tracking.mlflow=false goes without") from None

    def _new_run(self, run: Trainer) -> str:
        name = self._options.experiment
        existing = self._client.get_experiment_by_name(name)
        location = None if self._options.uri else (run.folder.resolve() / "mlflow-artifacts").as_uri()
        experiment = existing.experiment_id if existing else self._client.create_experiment(name, artifact_location=location)
        created = self._client.create_run(experiment, run_name=self._options.name or run.folder.name, tags=versions())
        run_id: str = created.info.run_id
        for key, value in _flat(run_folder.resolved(run.config)):
            self._client.log_param(run_id, key, value)
        self._client.log_param(run_id, "parameters", run.parameters)
        return run_id

    def after_step(self, run: Trainer, metrics: dict[str, float]) -> None:
        """Log the means over ``tracking.interval`` steps."""
        if self._client is None:
            return
        for key, value in metrics.items():
            self._values[key].append(value)
        if run.state.step % self._options.interval == 0 or run.state.step == run.config.run.steps:
            self._log(run.state.step, {f"train/{key}": sum(values) / len(values) for key, values in self._values.items()})
            self._values.clear()

    def after_evaluation(self, run: Trainer, metrics: dict[str, float]) -> None:
        """Log held-out metrics under ``held_out/``."""
        if self._client is not None:
            self._log(run.state.step, {f"held_out/{key}": value for key, value in metrics.items()})

    def _log(self, step: int, metrics: dict[str, float]) -> None:
        from mlflow.entities import Metric
        from mlflow.utils.time import get_current_time_millis

        now = get_current_time_millis()
        entries = [Metric(key, value, now, step) for key, value in metrics.items()]
        for start in range(0, len(entries), MOST_METRICS):
            self._client.log_batch(self._run, entries[start : start + MOST_METRICS])

    def stop(self, run: Trainer) -> None:
        """Set the status: FINISHED after all steps, KILLED after an early stop."""
        self._status = "FINISHED" if run.state.step >= run.config.run.steps else "KILLED"

    def close(self, run: Trainer) -> None:
        """End the mlflow run; its status is FAILED unless :meth:`stop` was called."""
        if self._client is not None and self._run:
            self._client.set_terminated(self._run, self._status)


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
