"""The journal of a run: every step's metrics as a line of JSON, every evaluation's too."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import IO, TYPE_CHECKING

from gptface_dist.files import write_atomically
from gptface_dist.training.callbacks.callback import Hook

if TYPE_CHECKING:
    from gptface_dist.training.trainer import Trainer

NAME = "metrics.jsonl"


class Journal(Hook):
    """``metrics.jsonl`` in the run's folder, written by rank 0.

    A resumed run goes on in the same file, without the lines of steps that it repeats.
    """

    def __init__(self) -> None:
        self._file: IO[str] | None = None

    def start(self, run: Trainer) -> None:
        """Open the file."""
        if run.rank_info.rank:
            return
        path = run.folder / NAME
        if path.exists():
            write_atomically(path, "".join(line for line in _whole_lines(path) if json.loads(line)["step"] <= run.state.step))
        self._file = path.open("a", encoding="utf-8")

    def after_step(self, run: Trainer, record: dict[str, float]) -> None:
        """Write the step's line."""
        self._write(run, "train", record)

    def after_evaluation(self, run: Trainer, record: dict[str, float]) -> None:
        """Write the evaluation's line."""
        self._write(run, "evaluation", record)

    def _write(self, run: Trainer, kind: str, record: dict[str, float]) -> None:
        if self._file is not None:
            self._file.write(json.dumps({"step": run.state.step, "kind": kind, **record}) + "\n")
            self._file.flush()

    def close(self, run: Trainer) -> None:
        """Close the file, its lines on disk."""
        if self._file is not None:
            os.fsync(self._file.fileno())
            self._file.close()


def read(folder: Path, kind: str = "train") -> list[dict[str, float]]:
    """The records of a run's journal, of ``train`` steps or ``evaluation``s, in order."""
    records = [json.loads(line) for line in _whole_lines(folder / NAME)]
    return [record for record in records if record["kind"] == kind]


def _whole_lines(path: Path) -> list[str]:
    """Lines of a file whose writer may have been killed within the last one."""
    return [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
