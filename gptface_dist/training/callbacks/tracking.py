"""mlflow: one run, written by rank 0, and gone on with after a resumption."""

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
"""File in the run's folder: a run killed before its first checkpoint is gone on with as well."""

MOST_METRICS = 1000
"""Metrics that mlflow takes at once."""


class Tracking(Callback):
    """Configuration, versions and metrics, in mlflow."""

    def __init__(self, options: TrackingOptions):
        self._options = options
        self._client: Any = None
        self._run = ""
        self._values: dict[str, list[float]] = defaultdict(list)
        self._status = "FAILED"

    def start(self, run: Trainer) -> None:
        """Begin the run, or go on with it."""
        if run.rank_info.rank or not self._options.mlflow:
            return
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        try:
            import mlflow
        except ImportError:
            raise UserError("mlflow is not installed: install gptface_dist[train], or set tracking.mlflow=false") from None
        # Creating the tables of a new database is told in a line each.
        for name in ("mlflow", "alembic"):
            logging.getLogger(name).setLevel(logging.WARNING)
        uri = self._options.uri or f"sqlite:///{run.folder.resolve() / 'mlflow.db'}"
        kept = run.folder / RUN_ID
        try:
            self._client = mlflow.MlflowClient(uri)
            self._run = kept.read_text(encoding="utf-8").strip() if kept.exists() else ""
            if self._run:
                self._client.update_run(self._run, status="RUNNING")
            else:
                self._run = self._new_run(run)
                write_atomically(kept, self._run + "\n")
            self._client.log_artifact(self._run, str(run.folder / run_folder.NAME))
        except mlflow.exceptions.MlflowException as error:
            raise UserError(f"mlflow at {uri}: {str(error).splitlines()[0]}; tracking.mlflow=false goes without") from None

    def _new_run(self, run: Trainer) -> str:
        name = self._options.experiment
        found = self._client.get_experiment_by_name(name)
        place = None if self._options.uri else (run.folder.resolve() / "mlflow-artifacts").as_uri()
        experiment = found.experiment_id if found else self._client.create_experiment(name, artifact_location=place)
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
            self._log(run.state.step, {f"train/{key}": sum(found) / len(found) for key, found in self._values.items()})
            self._values.clear()

    def after_evaluation(self, run: Trainer, metrics: dict[str, float]) -> None:
        """Log the evaluation."""
        if self._client is not None:
            self._log(run.state.step, {f"held_out/{key}": value for key, value in metrics.items()})

    def _log(self, step: int, metrics: dict[str, float]) -> None:
        from mlflow.entities import Metric
        from mlflow.utils.time import get_current_time_millis

        now = get_current_time_millis()
        found = [Metric(key, value, now, step) for key, value in metrics.items()]
        for start in range(0, len(found), MOST_METRICS):
            self._client.log_batch(self._run, found[start : start + MOST_METRICS])

    def stop(self, run: Trainer) -> None:
        """The run ended as it should."""
        self._status = "FINISHED" if run.state.step >= run.config.run.steps else "KILLED"

    def close(self, run: Trainer) -> None:
        """End the run in mlflow."""
        if self._client is not None and self._run:
            self._client.set_terminated(self._run, self._status)


def _flat(config: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested keys joined by dots, values as YAML in one line, cut to what mlflow takes."""
    found = []
    for key, value in config.items():
        if isinstance(value, dict):
            found += _flat(value, f"{prefix}{key}.")
        else:
            text = yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix("\n...\n").strip()
            found.append((f"{prefix}{key}", text[:6000]))
    return found
