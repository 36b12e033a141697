"""Saves a run, and loads the one that it resumes from."""

import logging
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gptface_dist.checkpoint import folder
from gptface_dist.checkpoint.background import Background, staged
from gptface_dist.checkpoint.load import damage, find, load_checkpoint
from gptface_dist.checkpoint.manifest import MANIFEST_NAME
from gptface_dist.checkpoint.options import CheckpointOptions
from gptface_dist.checkpoint.record import RunRecord
from gptface_dist.checkpoint.save import Content, save_checkpoint
from gptface_dist.checkpoint.tensor_shards import collect_shards
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
    """Saves every so many steps, when asked, and at the end; in ``start``, goes on from the run's latest checkpoint.

    It stands before the callbacks that have a state: they start with the run's state, and their own, as they were saved. It
    saves before the next step, when all callbacks have seen the last one and its evaluation.
    """

    def __init__(self, options: CheckpointOptions):
        self._options = options
        self._requested = False
        self._tried = self._saved = 0
        """Steps of the last checkpoints begun and published; there is none of step 0."""
        self._origin = ""
        self._metrics: dict[str, float] = {}
        self._waited = 0.0

    def start(self, run: Trainer) -> None:
        """Find what to go on from, and read it."""
        self._checkpoints = run.folder / folder.FOLDER_NAME
        # The thread that writes in the background talks over the first of these.
        self._ranks, self._asking = RankGroup.of_world(), RankGroup.of_world()
        self._background = Background(self._asking)
        self._reference = _reference_batch(run)
        source = self._source()
        if source is not None:
            self._resume(run, source)

    def request(self) -> None:
        """Save after the present step. All ranks must ask at the same step."""
        self._requested = True

    def before_step(self, run: Trainer) -> None:
        """Save if it is time."""
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
        """Add ``checkpoint_s``: seconds that training waited for a checkpoint before the step."""
        if self._waited:
            metrics["checkpoint_s"], self._waited = self._waited, 0.0
        self._metrics = metrics

    def stop(self, run: Trainer) -> None:
        """Save where the run stops."""
        self._finish()
        if run.state.step > self._saved:
            self._save(run, asynchronous=False)
            self._finish(last=True)

    def _source(self) -> Path | None:
        """The checkpoint to go on from; :class:`UserError` where it is not as the options want it."""
        options = self._options
        own = None
        if self._ranks.on_rank0(lambda: self._checkpoints.is_dir() and bool(folder.published(self._checkpoints))):
            if options.resume == "never":
                raise UserError(
                    f"{self._checkpoints} holds checkpoints and checkpoint.resume is never: choose another run.folder"
                )
            own = find(self._checkpoints, self._ranks, options.damaged == "previous")
        if options.resume_from:
            named, self._origin = self._ranks.on_rank0(lambda: _named(Path(options.resume_from)))
            if own is None or self._ranks.on_rank0(lambda: _origin(own)) != self._origin:
                if reason := damage(named, self._ranks):
                    raise UserError(f"checkpoint.resume_from: {reason}")
                return Path(named)
        if own is None and options.resume == "must":
            raise UserError(f"{self._checkpoints} holds no checkpoint, and checkpoint.resume is must")
        return own

    def _resume(self, run: Trainer, source: Path) -> None:
        record = self._ranks.on_rank0(lambda: RunRecord.read(source))
        if found := record.differences(asdict(run.config.model), asdict(run.config.objective), run.vocabulary):
            raise UserError(f"{source} is of another model: {'; '.join(found)}")
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
        pieces = collect_shards(run.engine.state.local_shards(), written=True)
        dtype = run.config.engine.dtype
        content = Content(
            pieces=staged(pieces) if asynchronous else pieces,
            record=record,
            files={REFERENCE_NAME: ReferenceOutputs(self._reference, outputs, dtype).content()},
        )

        def write() -> None:
            save_checkpoint(self._checkpoints, content, self._ranks)
            self._ranks.on_rank0(lambda: folder.prune(self._checkpoints, step, options.keep_last, options.keep_interval))

        self._tried = step
        self._background.begin(write)

    def _finish(self, last: bool = False) -> None:
        """Wait for what is being written. A failure is the same on every rank; the last one always ends the run."""
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


def _named(path: Path) -> tuple[Path, str]:
    """The checkpoint that a path means, and the SHA-256 of its manifest."""
    found = folder.resolve(path)
    return found, sha256(found / MANIFEST_NAME)


def _run_state(raw: dict[str, Any]) -> TrainState:
    position = raw["position"]
    return TrainState(**raw | {"position": None if position is None else Position(**position)})
