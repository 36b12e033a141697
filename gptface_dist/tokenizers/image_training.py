"""Train an image tokenizer: the loop, its metrics and checkpoints, and the final folder.

During training, the folder contains ``checkpoint.pt`` and ``metrics.jsonl``; at the end the tokenizer in diffusers' format,
``metrics.jsonl``, ``summary.json`` and ``sheet.png``, and no checkpoint.
"""

import contextlib
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor

from gptface_dist.errors import UserError, one_line
from gptface_dist.files import write_atomically
from gptface_dist.folder_lock import FolderLock
from gptface_dist.tokenizers.codebook import perplexity, share_used
from gptface_dist.tokenizers.image import ImageTokenizer, save_model
from gptface_dist.tokenizers.image_evaluation import evaluate, to_png
from gptface_dist.tokenizers.image_files import CONFIG_NAME
from gptface_dist.tokenizers.image_options import ImageArchitecture, ImageTrainingOptions
from gptface_dist.tokenizers.image_state import ImageTrainingState, StepRecord
from gptface_dist.tokenizers.processes import Processes

CHECKPOINT_NAME = "checkpoint.pt"
CHECKPOINT_FORMAT = "gptface-image-training-1"
METRICS_NAME = "metrics.jsonl"
SUMMARY_NAME = "summary.json"
SHEET_NAME = "sheet.png"


@dataclass(frozen=True)
class ImageRun:
    """Options and data of a training run; it resumes only where all of them are the same."""

    architecture: ImageArchitecture
    """Shape of the autoencoder."""
    training: ImageTrainingOptions
    """Optimizer, losses and intervals."""
    data: str
    """Hash of the pictures and their order."""
    held_out: int
    """Pictures kept out of training for the evaluation."""

    def described(self) -> dict[str, Any]:
        """The fields as plain JSON values (tuples as lists), as the checkpoint and the summary store them."""
        return json.loads(json.dumps(asdict(self)))

    def differences(self, other: dict[str, Any]) -> list[str]:
        """``name=theirs, not ours`` for each field in which another run's description differs."""
        ours, theirs = (
            {**run["architecture"], **run["training"], "held_out": run["held_out"]} for run in (self.described(), other)
        )
        changed = [f"{name}={theirs.get(name)}, not {value}" for name, value in ours.items() if theirs.get(name) != value]
        # The order's hash also depends on seed and held_out, whose differences are listed already.
        same_order = {"seed", "held_out"}.isdisjoint(name for name in ours if theirs.get(name) != ours[name])
        return changed + (["other pictures"] if same_order and other["data"] != self.data else [])


def train_image_tokenizer(
    batches: Callable[[int], Iterator[Tensor]],
    held_out: Callable[[], Iterable[Tensor]],
    folder: Path,
    run: ImageRun,
    processes: Processes,
    on_step: Callable[[int, dict[str, float] | None], None] = lambda step, metrics: None,
) -> dict[str, Any]:
    """Train an image tokenizer into ``folder``, from its checkpoint where there is one.

    Called alike on every process. With the same global batches, any number of processes computes the same losses and
    gradients up to the rounding of sums; on the CPU in fp32, an interrupted run ends with the same bits as one that was not.

    Args:
        batches: given a step, yields this process's share of that step's global batch and of every following one:
            float32 ``[batch / processes, 3, S, S]`` in [-1, 1]. Shares are in the order of ranks.
        held_out: pictures for the final evaluation, in batches like those, not among those trained on.
        folder: folder of the tokenizer; made if missing.
        run: architecture, options, and the hash of the data.
        processes: this process and its group.
        on_step: called with the number of steps done, and the metrics where a line of them was written.

    Returns the summary, which is also in ``summary.json``. :class:`UserError` where the folder was made otherwise, the
    batch does not divide, the data ends, or the loss is no number.
    """
    try:
        lock = FolderLock(folder, "folder") if processes.rank == 0 else contextlib.nullcontext()
    except OSError as error:
        raise UserError(f"{folder} cannot be made: {error.strerror}") from None
    with lock:
        return _train(batches, held_out, folder, run, processes, on_step)


def _train(
    batches: Callable[[int], Iterator[Tensor]],
    held_out: Callable[[], Iterable[Tensor]],
    folder: Path,
    run: ImageRun,
    processes: Processes,
    on_step: Callable[[int, dict[str, float] | None], None],
) -> dict[str, Any]:
    share, size = processes.share(run.training.batch), run.architecture.size
    if (done := _finished(folder, run)) is not None:
        return done
    state = ImageTrainingState(run.architecture, run.training, processes)
    window = _Window(run.architecture.codes, processes)
    _resume(folder, run, state, window)
    if processes.rank == 0:
        _cut_metrics(folder / METRICS_NAME, state.step)
    on_step(state.step, None)
    stream = batches(state.step)
    while state.step < run.training.steps:
        pixels = next(stream, None)
        if pixels is None:
            raise UserError(f"the pictures end before step {state.step + 1} of {run.training.steps}")
        if tuple(pixels.shape) != (share, 3, size, size) or pixels.dtype != torch.float32:
            raise ValueError(f"a batch is {pixels.dtype} {tuple(pixels.shape)}, not float32 {(share, 3, size, size)}")
        window.add(state.train_step(pixels.to(processes.device)))
        metrics = None
        if state.step % run.training.log_every == 0 or state.step == run.training.steps:
            metrics = window.close(state.step, run.training.batch)
            if processes.rank == 0:
                with (folder / METRICS_NAME).open("a") as file:
                    file.write(json.dumps(metrics) + "\n")
            if not math.isfinite(metrics["loss"] + metrics["gradient_norm"]):
                raise UserError(f"the loss is no number at step {state.step}: start anew with a lower learning rate")
        if state.step % run.training.checkpoint_every == 0 or state.step == run.training.steps:
            _save_checkpoint(folder, run, state, window)
        on_step(state.step, metrics)
    return _finish(folder, run, state, held_out)


class _Window:
    """Accumulates metrics and code counts since the last line of metrics, as means over steps and processes."""

    def __init__(self, codes: int, processes: Processes):
        self._processes = processes
        self._sums: dict[str, Tensor] = {}
        self._steps: dict[str, int] = {}
        self._counts = torch.zeros(codes, dtype=torch.int64, device=processes.device)
        self._rate = 0.0
        self._started, self._since = time.monotonic(), 0

    def add(self, record: StepRecord) -> None:
        for name, value in record.losses.items():
            self._sums[name] = self._sums.get(name, 0) + value.double()
            self._steps[name] = self._steps.get(name, 0) + 1
        self._counts += record.counts
        self._rate = record.rate
        self._since += 1

    def close(self, step: int, batch: int) -> dict[str, float]:
        """Return the line of metrics and start a new window."""
        names = sorted(self._sums)
        values = self._processes.mean(torch.stack([self._sums[name] / self._steps[name] for name in names]))
        seconds = time.monotonic() - self._started
        metrics: dict[str, float] = {"step": step, **dict(zip(names, values.tolist(), strict=True))}
        metrics |= {"codes_used": share_used(self._counts), "perplexity": perplexity(self._counts)}
        metrics |= {"learning_rate": self._rate, "pictures_per_second": self._since * batch / max(seconds, 1e-9)}
        self._sums, self._steps, self._since, self._started = {}, {}, 0, time.monotonic()
        self._counts.zero_()
        return metrics

    def state(self) -> dict[str, Any]:
        """The sums so far, averaged over processes, since each process has its own and rank 0 alone saves them."""
        names = sorted(self._sums)
        sums = {name: self._processes.mean(self._sums[name].clone()) for name in names}
        return {"sums": sums, "steps": dict(self._steps), "counts": self._counts}

    def load(self, state: dict[str, Any]) -> None:
        self._sums = {name: value.to(self._counts.device) for name, value in state["sums"].items()}
        self._steps = state["steps"]
        self._counts.copy_(state["counts"])


def _save_checkpoint(folder: Path, run: ImageRun, state: ImageTrainingState, window: _Window) -> None:
    """Replace ``checkpoint.pt`` atomically, after the new one is flushed to disk."""
    gathered = window.state()
    if state.processes.rank == 0:
        raw = {"format": CHECKPOINT_FORMAT, "run": run.described(), "state": state.state(), "window": gathered}
        temporary = folder / f".{CHECKPOINT_NAME}.tmp"
        try:
            with temporary.open("wb") as file:
                torch.save(raw, file)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(folder / CHECKPOINT_NAME)
        finally:
            temporary.unlink(missing_ok=True)
    state.processes.wait()


def begun_precision(folder: Path) -> str | None:
    """Precision of the training that ``folder`` holds, finished or not; None if it holds none that can be read."""
    try:
        if (folder / SUMMARY_NAME).exists():
            run = json.loads((folder / SUMMARY_NAME).read_bytes())["run"]
        else:
            run = torch.load(folder / CHECKPOINT_NAME, map_location="cpu", mmap=True, weights_only=True)["run"]
        precision: str = run["training"]["precision"]
        return precision
    except Exception:  # whatever a damaged file raises: the training itself says what is wrong with it
        return None


def _resume(folder: Path, run: ImageRun, state: ImageTrainingState, window: _Window) -> None:
    """Load ``checkpoint.pt``, if it exists, into ``state`` and ``window``."""
    path = folder / CHECKPOINT_NAME
    if not path.exists():
        return
    try:
        raw = torch.load(path, map_location=state.processes.device, weights_only=True)
        version = raw["format"]
    except Exception as error:  # torch raises many kinds for a damaged file
        reason = one_line(error)[:200]
        raise UserError(f"{path} cannot be read ({reason}): remove it to start anew") from None
    if version != CHECKPOINT_FORMAT:
        raise UserError(f"{path} has the format {version}, not {CHECKPOINT_FORMAT}: remove it to start anew")
    _refuse_other(folder, run, raw["run"])
    state.load(raw["state"])
    window.load(raw["window"])


def _finished(folder: Path, run: ImageRun) -> dict[str, Any] | None:
    """The summary of a folder that this run has completed; None if it has not."""
    path = folder / SUMMARY_NAME
    if not path.exists():
        if (folder / CONFIG_NAME).exists() and not (folder / CHECKPOINT_NAME).exists():
            raise UserError(f"{folder} already holds an image tokenizer from elsewhere: train into another folder")
        return None
    try:
        summary: dict[str, Any] = json.loads(path.read_bytes())
        _refuse_other(folder, run, summary["run"])
    except (KeyError, TypeError, json.JSONDecodeError):
        raise UserError(f"{path} is not of an image tokenizer's training: train into another folder") from None
    return summary


def _refuse_other(folder: Path, run: ImageRun, other: dict[str, Any]) -> None:
    if differences := run.differences(other):
        raise UserError(f"{folder} was trained with {'; '.join(differences)}: train into another folder, or remove it")


def _cut_metrics(path: Path, step: int) -> None:
    """Remove the lines of steps after ``step``, which will be repeated."""
    if path.exists():
        lines = path.read_text().splitlines(keepends=True)
        write_atomically(path, "".join(line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step))


def _finish(folder: Path, run: ImageRun, state: ImageTrainingState, held_out: Callable[[], Iterable[Tensor]]) -> dict[str, Any]:
    """Save the tokenizer, load and evaluate it, and write the summary last: it marks the folder as complete."""
    if state.processes.rank == 0:
        save_model(state.autoencoder.model, folder)
        tokenizer = ImageTokenizer.load(folder, state.processes.device)
        result, sheet = evaluate(tokenizer, held_out())
        write_atomically(folder / SHEET_NAME, to_png(sheet))
        summary = {
            "sha256": tokenizer.sha256,
            "held_out": asdict(result),
            "parameters": sum(parameter.numel() for parameter in state.autoencoder.parameters()),
            "run": run.described(),
            "versions": {"torch": torch.__version__, "diffusers": diffusers.__version__},
        }
        write_atomically(folder / SUMMARY_NAME, json.dumps(summary, indent=1) + "\n")
        (folder / CHECKPOINT_NAME).unlink(missing_ok=True)
    state.processes.wait()
    finished: dict[str, Any] = json.loads((folder / SUMMARY_NAME).read_bytes())
    return finished
