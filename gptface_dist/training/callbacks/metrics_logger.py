"""Writes the metrics of a run to its folder."""

from __future__ import annotations

import contextlib
import json
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING

from gptface_dist.files import write_atomically
from gptface_dist.training.callbacks.callback import Callback
from gptface_dist.training.metrics import NAME, read_metrics, whole_lines

if TYPE_CHECKING:
    from gptface_dist.training.trainer import Trainer

log = logging.getLogger(__name__)

MOST_WAITING = 100_000
"""Lines that wait in memory, at most, while the file cannot be written; the oldest are dropped."""


class MetricsLogger(Callback):
    """``metrics.jsonl`` in the run's folder, written by rank 0.

    A resumed run appends to the same file, after removing the lines of steps that it repeats. A file that cannot be written,
    as on a full disk, does not end the run: lines wait until it can.
    """

    def __init__(self) -> None:
        self._file: LineFile | None = None

    def start(self, run: Trainer) -> None:
        """Refuse the run where the file cannot be read."""
        if run.rank_info.rank == 0 and (run.folder / NAME).exists():
            read_metrics(run.folder)

    def begin(self, run: Trainer) -> None:
        """Open the file on rank 0, and drop lines after the resumed step."""
        if run.rank_info.rank == 0:
            self._file = LineFile(run.folder / NAME, run.state.step)

    def after_step(self, run: Trainer, metrics: dict[str, float]) -> None:
        """Write a line of kind ``train``."""
        self._write(run, "train", metrics)

    def after_evaluation(self, run: Trainer, metrics: dict[str, float]) -> None:
        """Write a line of kind ``evaluation``."""
        self._write(run, "evaluation", metrics)

    def _write(self, run: Trainer, kind: str, metrics: dict[str, float]) -> None:
        if self._file is not None:
            self._file.write(json.dumps({"step": run.state.step, "kind": kind, **metrics}))

    def close(self, run: Trainer) -> None:
        """Flush the file to disk and close it."""
        if self._file is not None:
            self._file.close()


class LineFile:
    """A file of JSON lines that grows by whole lines, in order, as soon as its disk lets it."""

    def __init__(self, path: Path, step: int):
        """Open or make the file, without the lines after ``step``. Never fails: see :meth:`write`."""
        self._path, self._step = path, step
        self._descriptor = -1
        self._size = 0
        self._waiting: list[bytes] = []
        self._dropped = 0
        self._failing = False
        self._flush()

    def write(self, line: str) -> None:
        """Append a line. Where that fails, say so once, and try again with the next one."""
        self._waiting.append(line.encode() + b"\n")
        if len(self._waiting) > MOST_WAITING:
            del self._waiting[0]
            self._dropped += 1
        self._flush()

    def close(self) -> None:
        """Try once more, flush to disk, close. Says which lines are lost."""
        self._flush()
        if lost := len(self._waiting) + self._dropped:
            log.error("%s lacks %d lines of this run's metrics: it could not be written", self._path, lost)
        if self._descriptor >= 0:
            with contextlib.suppress(OSError):
                os.fsync(self._descriptor)
            os.close(self._descriptor)
            self._descriptor = -1

    def _flush(self) -> None:
        try:
            if self._descriptor < 0:
                self._open()
            data = b"".join(self._waiting)
            done = 0
            while done < len(data):
                done += os.pwrite(self._descriptor, data[done:], self._size + done)
        except OSError as error:
            if self._descriptor >= 0:
                with contextlib.suppress(OSError):
                    # A part of a line may be there.
                    os.ftruncate(self._descriptor, self._size)
            if not self._failing:
                log.error("%s cannot be written: %s; training goes on, and its lines wait", self._path, error.strerror)
            self._failing = True
            return
        self._size += len(data)
        self._waiting.clear()
        if self._failing:
            log.warning("%s can be written again", self._path)
        self._failing = False

    def _open(self) -> None:
        if self._path.exists():
            lines = whole_lines(self._path)
            kept = [line for line in lines if json.loads(line)["step"] <= self._step]
            if kept != lines or self._path.stat().st_size != sum(len(line.encode()) for line in kept):
                write_atomically(self._path, "".join(kept))
        self._descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
        self._size = os.fstat(self._descriptor).st_size
