"""Saves checkpoints of a run, and loads the one that the run resumes from."""

import logging
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from gptface_dist.checkpoint import folder
from gptface_dist.checkpoint.background import Background, staged
from gptface_dist.checkpoint.load import damage, find, load_checkpoint
from gptface_dist.checkpoint.manifest import MANIFEST_NAME
from gptface_dist.checkpoint.options import CheckpointOptions
from gptface_dist.checkpoint.record import RunRecord
from gptface_dist.checkpoint.save import Content, check_finite, save_checkpoint
from gptface_dist.checkpoint.tensor_shards import TensorShards, collect_shards
from gptface_dist.data.loader import Position
from gptface_dist.data.sources import open_sources
from gptface_dist.distributed.collectives import Failed, RankGroup
from gptface_dist.errors import UserError
from gptface_dist.files import sha256
from gptface_dist.model.reference_batch import ReferenceBatch, reference_batch
from gptface_dist.objectives.reference_outputs import REFERENCE_NAME, ReferenceOutputs
from gptface_dist.training.callbacks.callback import Callback
from gptface_dist.training.run_folder import resolved
from gptface_dist.training.state import TrainState
from gptface_dist.training.trainer import Trainer
from gptface_dist.training.versions import versions

log = logging.getLogger(__name__)


class Checkpointing(Callback):
    """Saves at an interval, on request, and at the end; in ``start``, resumes from the run's latest checkpoint.

    It comes before the callbacks that have a state, so that they start with the saved state of the run and their own. It saves
    before the next step, after all callbacks have handled the last one and its evaluation.
    """

    def __init__(self, options: CheckpointOptions, timeout_s: float):
        self._options, self._timeout_s = options, timeout_s
        self._damaged: list[Path] = []
        self._requested = False
        self._tried = self._saved = 0
        """Step of the last checkpoint started / published; 0 if none."""
        self._origin = ""
        self._metrics: dict[str, float] = {}
        self._waited = 0.0

    def start(self, run: Trainer) -> None:
        """Find the checkpoint to resume from, and load it."""
        self._checkpoints = run.folder / folder.FOLDER_NAME
        # The background thread uses the first group, the main thread's `done` the second.
        self._ranks, self._status_ranks = RankGroup.of_world(self._timeout_s), RankGroup.of_world(self._timeout_s)
        self._background = Background(self._status_ranks)
        self._reference = _reference_batch(run)
        source = self._source()
        if source is not None:
            self._resume(run, source)

    def begin(self, run: Trainer) -> None:
        """Rename the damaged checkpoints that were passed over."""
        if run.rank_info.rank == 0:
            folder.set_aside(self._damaged)

    def request(self) -> None:
        """Save after the present step. All ranks must call it at the same step."""
        self._requested = True

    def before_step(self, run: Trainer) -> None:
        """Save if a checkpoint is due or requested."""
        began = time.perf_counter()
        if self._background.busy and self._background.done():
            self._finish()
        due = self._options.interval and run.state.step % self._options.interval == 0
        if (due or self._requested) and run.state.step > self._tried:
            self._save(run, self._options.asynchronous)
            if not self._options.asynchronous:
                self._finish()
            self._waited = time.perf_counter() - began

    def after_step(self, run: Trainer, metrics: dict[str, float]) -> None:
        """Add ``checkpoint_s``: seconds for which a checkpoint delayed the step."""
        if self._waited:
            metrics["checkpoint_s"], self._waited = self._waited, 0.0
        self._metrics = metrics

    def stop(self, run: Trainer) -> None:
        """Save the last step, unless it is saved already."""
        self._finish()
        if run.state.step > self._saved:
            self._save(run, asynchronous=False)
            self._finish(last=True)

    def _source(self) -> Path | None:
        """The checkpoint to resume from, or None; :class:`UserError` if the options forbid it."""
        options = self._options
        latest = None
        if self._ranks.on_rank0(lambda: self._checkpoints.is_dir() and bool(folder.published(self._checkpoints))):
            if options.resume == "never":
                raise UserError(
                    f"{self._checkpoints} holds checkpoints and checkpoint.resume is never: choose another run.folder"
                )
            latest, self._damaged = find(self._checkpoints, self._ranks, options.damaged == "previous")
        if options.resume_from:
            name, self._origin = self._ranks.on_rank0(lambda: _named(Path(options.resume_from)))
            named = Path(name)
            if latest is None or self._ranks.on_rank0(lambda: _origin(latest)) != self._origin:
                if reason := damage(named, self._ranks):
                    raise UserError(f"checkpoint.resume_from: {reason}")
                return named
        if latest is None and options.resume == "must":
            raise UserError(f"{self._checkpoints} holds no checkpoint, and checkpoint.resume is must")
        return latest

    def _resume(self, run: Trainer, source: Path) -> None:
        record = RunRecord.parse(self._ranks.on_rank0(lambda: RunRecord.read(source).text()), source)
        if differences := record.differences(asdict(run.config.model), asdict(run.config.objective), run.vocabulary):
            raise UserError(f"{source} is of another model: {'; '.join(differences)}")
        load_checkpoint(source, run.engine.state, self._ranks)
        run.state = _run_state(record.state)
        self._origin = self._origin or record.origin
        self._tried = self._saved = record.step
        for callback in run.callbacks:
            if (name := type(callback).__name__) in run.state.callbacks:
                callback.restore(run.state.callbacks[name])
        if run.rank_info.rank == 0:
            log.info("going on from %s", source)

    def _save(self, run: Trainer, asynchronous: bool) -> None:
        self._finish()
        self._requested = False
        step, options = run.state.step, self._options
        outputs = run.engine.reference_outputs(self._reference)
        shards = collect_shards(run.engine.state.local_shards(), written=True)
        self._check_finite(step, shards, outputs)
        state = asdict(run.state) | {"callbacks": {type(each).__name__: each.state() for each in run.callbacks}}
        record = RunRecord(
            step=step,
            updates=run.engine.state.updates,
            state=state,
            config=resolved(run.config),
            vocabulary=asdict(run.vocabulary),
            metrics=self._metrics,
            origin=self._origin,
            versions=versions(),
        )
        dtype = run.config.engine.dtype
        content = Content(
            pieces=staged(shards) if asynchronous else shards,
            record=record,
            files={REFERENCE_NAME: ReferenceOutputs(self._reference, outputs, dtype).content()},
        )

        def write() -> None:
            save_checkpoint(self._checkpoints, content, self._ranks)
            self._ranks.on_rank0(lambda: len(folder.prune(self._checkpoints, step, options.keep_last, options.keep_interval)))

        self._tried = step
        self._background.begin(write)

    def _check_finite(self, step: int, shards: Mapping[str, TensorShards], outputs: Mapping[str, Tensor]) -> None:
        """:class:`UserError` where the model's outputs are not finite, as by weights that are not, or are too large."""
        bad = [name for name, output in outputs.items() if not output.isfinite().all()]
        if not bad:
            return
        # The tensors say more, if it is they.
        self._ranks.all_gather(lambda: check_finite(shards, step))
        raise UserError(
            f"step {step}: outputs of the model for the reference batch ({', '.join(bad)}) are NaN or infinite: no checkpoint "
            "of it is written, and the one before is sound; a lower optimizer.lr or other data may help"
        )

    def _finish(self, last: bool = False) -> None:
        """Wait for the checkpoint being written. A failure is the same on every rank; if ``last``, it always ends the run."""
        try:
            self._background.wait()
            self._saved = self._tried
        except Failed as error:
            message = f"checkpoint {self._checkpoints / folder.name_of(self._tried)} could not be written: {error}"
            if last or self._options.on_failure == "stop":
                raise UserError(f"{message}; the one before is sound") from None
            if self._ranks.rank == 0:
                log.error("%s; training goes on", message)


def _reference_batch(run: Trainer) -> ReferenceBatch:
    data = run.config.data
    _, grid = open_sources(data, run.vocabulary)
    return reference_batch(run.vocabulary, grid, data.batch.text_length, data.batch.pad_to_multiple_of)


def _origin(path: Path) -> str:
    return RunRecord.read(path).origin


def _named(path: Path) -> tuple[str, str]:
    """The checkpoint at a path (:func:`folder.resolve`), and the SHA-256 of its manifest."""
    checkpoint = folder.resolve(path)
    return str(checkpoint), sha256(checkpoint / MANIFEST_NAME)


def _run_state(raw: dict[str, Any]) -> TrainState:
    position = raw["position"]
    return TrainState(**raw | {"position": None if position is None else Position(**position)})
