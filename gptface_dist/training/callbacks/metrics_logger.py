"""Writes the metrics of a run to its folder."""

from __future__ import annotations

import json
import os
from typing import IO, TYPE_CHECKING

from gptface_dist.files import write_atomically
from gptface_dist.training.callbacks.callback import Callback
from gptface_dist.training.metrics import NAME, whole_lines

if TYPE_CHECKING:
    from gptface_dist.training.trainer import Trainer


class MetricsLogger(Callback):
    """``metrics.jsonl`` in the run's folder, written by rank 0.

    A resumed run appends to the same file, after removing the lines of steps that it repeats.
    """

    def __init__(self) -> None:
        self._file: IO[str] | None = None

    def start(self, run: Trainer) -> None:
        """Open the file on rank 0, and drop lines after the resumed step."""
        if run.rank_info.rank:
            return
        path = run.folder / NAME
        if path.exists():
            write_atomically(path, "".join(line for line in whole_lines(path) if json.loads(line)["step"] <= run.state.step))
        self._file = path.open("a", encoding="utf-8")

    def after_step(self, run: Trainer, metrics: dict[str, float]) -> None:
        """Write a line of kind ``train``."""
        self._write(run, "train", metrics)

    def after_evaluation(self, run: Trainer, metrics: dict[str, float]) -> None:
        """Write a line of kind ``evaluation``."""
        self._write(run, "evaluation", metrics)

    def _write(self, run: Trainer, kind: str, metrics: dict[str, float]) -> None:
        if self._file is not None:
            self._file.write(json.dumps({"step": run.state.step, "kind": kind, **metrics}) + "\n")
            self._file.flush()

    def close(self, run: Trainer) -> None:
        """Flush the file to disk and close it."""
        if self._file is not None:
            os.fsync(self._file.fileno())
            self._file.close()
