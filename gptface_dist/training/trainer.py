"""The training loop: read a step's data, do an optimizer step, call the callbacks.

``prepare`` and ``build_trainer`` construct a run in order; ``Trainer.train`` is the loop.
"""

import contextlib
import itertools
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch.distributed as dist

from gptface_dist import host, release
from gptface_dist.data.loader import Position
from gptface_dist.distributed.collectives import barrier
from gptface_dist.distributed.rank import RankInfo
from gptface_dist.distributed.watchdog import Watchdog
from gptface_dist.engine.engine import Engine, StepResult
from gptface_dist.errors import UserError
from gptface_dist.parallel import groups, libraries
from gptface_dist.sequence import PaddedBatch
from gptface_dist.tokenizers.vocabulary import Vocabulary
from gptface_dist.training import init_from
from gptface_dist.training.callbacks.callback import Callback
from gptface_dist.training.config import Config
from gptface_dist.training.data import BatchLoader, batch_loader
from gptface_dist.training.evaluation import Evaluation
from gptface_dist.training.meter import Meter
from gptface_dist.training.metrics import loss_metrics
from gptface_dist.training.state import TrainState

Steps = Iterator[tuple[list[PaddedBatch[np.ndarray]], Position]]

log = logging.getLogger(__name__)


class Trainer:
    """A run on one rank: configuration, engine, loader, callbacks and progress."""

    def __init__(
        self,
        config: Config,
        rank_info: RankInfo,
        vocabulary: Vocabulary,
        engine: Engine,
        loader: BatchLoader,
        evaluation: Evaluation | None,
        callbacks: Sequence[Callback],
    ):
        self.config, self.rank_info, self.engine, self.vocabulary = config, rank_info, engine, vocabulary
        self.callbacks = callbacks
        self.folder = Path(config.run.folder)
        self.parameters = engine.objective.parameter_count(config.model, vocabulary)
        """Number of trainable values of the whole model."""
        self.state = TrainState()
        """Progress of the run; a callback may replace it in ``start``."""
        self.stopped_by = ""
        """Reason of a requested stop; empty while the run continues."""
        self.update_factor = 1.0
        """Factor of the last step's clipped gradient; 0 if its update was skipped."""
        self._loader, self._evaluation = loader, evaluation
        self._meter = Meter(config.model, vocabulary, config.layout, config.engine.dtype, engine)

    def stop(self, reason: str) -> None:
        """Stop after the present step. All ranks must call it at the same step."""
        self.stopped_by = reason

    def skip_update(self, reason: str) -> None:
        """In ``before_update``: skip the update of weights, moments and EMA. The run does not read the step's data again."""
        self.update_factor = 0.0
        if self.rank_info.rank == 0:
            log.warning("step %d: update skipped: %s", self.state.step + 1, reason)

    def scale_update(self, factor: float) -> None:
        """In ``before_update``: scale the clipped gradient. Factors of several callbacks multiply; 0 stays 0."""
        self.update_factor *= factor

    def train(self) -> None:
        """Resume from ``state`` and train to the last step, or until a callback stops the run."""
        with contextlib.ExitStack() as ending:
            for callback in self.callbacks:
                ending.callback(callback.close, self)
                callback.start(self)
            if self.state.step > self.config.run.steps:
                raise UserError(
                    f"run.steps is {self.config.run.steps}, and {self.folder} has done {self.state.step}: raise it to go on, "
                    "or name an earlier checkpoint by checkpoint.resume_from"
                )
            self.engine.steps = self.state.step
            steps = self._read_ahead()
            # Nothing is written before the last refusal of any rank. A rank that refuses ends the others here (Watchdog).
            barrier()
            for callback in self.callbacks:
                callback.begin(self)
            while self.state.step < self.config.run.steps and not self.stopped_by:
                for callback in self.callbacks:
                    callback.before_step(self)
                self._meter.begin()
                items, position = next(steps)
                self._meter.mark()
                batches = [item.tensors(self.engine.device) for item in items]
                lr = self.config.optimizer.lr * self.config.schedule.factor(self.state.step, self.config.schedule_steps)
                self.engine.set_lr(lr)
                result = self.engine.step(batches, self._before_update)
                metrics = {"loss": result.loss, **loss_metrics(self.engine.objective, result.sums)}
                metrics |= {"grad_norm": result.grad_norm, "lr": lr, "allgather_bytes": result.allgather_bytes}
                metrics |= self._meter.end(result)
                metrics |= {"bad_samples": self._loader.bad, "skipped_samples": self._loader.skipped}
                if self.update_factor != 1:
                    metrics["update_factor"] = self.update_factor
                self.state = replace(
                    self.state,
                    step=self.state.step + 1,
                    position=position,
                    samples=self.state.samples + result.samples,
                    tokens=self.state.tokens + result.work.tokens,
                    seconds=self.state.seconds + metrics["seconds"],
                )
                for callback in self.callbacks:
                    callback.after_step(self, metrics)
                self._evaluate()
            for callback in self.callbacks:
                callback.stop(self)

    def _read_ahead(self) -> Steps:
        """The data of the steps that are left. The first step's are read at once, so that data that cannot be read refuse the
        run before anything is written; that step's ``seconds/data`` are not those of reading them.
        """
        steps = self._loader.steps(self.state.position)
        if self.state.step >= self.config.run.steps:
            return steps
        return itertools.chain([next(steps)], steps)

    def _before_update(self, result: StepResult) -> float:
        self._meter.mark()
        self.update_factor = 1.0
        for callback in self.callbacks:
            callback.before_update(self, result)
        if self.update_factor:
            check_finite(self.state.step, result)
        return self.update_factor

    def _evaluate(self) -> None:
        last = self.state.step == self.config.run.steps or self.stopped_by
        if self._evaluation is None or (self.state.step % self.config.evaluation.interval and not last):
            return
        metrics = self._evaluation()
        for callback in self.callbacks:
            callback.after_evaluation(self, metrics)


def check_finite(step: int, result: StepResult) -> None:
    """Raise :class:`UserError` if loss or gradient norm are not finite, before the update. All ranks see the same values."""
    if not (math.isfinite(result.loss) and math.isfinite(result.grad_norm)):
        values = f"loss {result.loss:g}, norm of the gradient {result.grad_norm:g}"
        raise UserError(
            f"step {step}: {values}: the run ends here, before the update, and its last checkpoint is sound; a lower "
            "optimizer.lr, a longer schedule.warmup_steps or other data may help"
        )


def prepare(config: Config, vocabulary: Vocabulary, watchdog: Watchdog, callbacks: Sequence[Callback]) -> Trainer:
    """Create process groups on this rank, then build the trainer of a checked run."""
    groups.join(watchdog.rank_info, watchdog.store, config.run.timeout_s)
    with libraries.quiet_imports():
        groups.start(config.layout, config.run.seed, config.run.timeout_s)
    return build_trainer(config, vocabulary, watchdog.rank_info, callbacks)


def build_trainer(config: Config, vocabulary: Vocabulary, rank_info: RankInfo, callbacks: Sequence[Callback]) -> Trainer:
    """Build loader, engine and trainer on this rank; process groups must exist."""
    if rank_info.rank == 0:
        host.warn_of_emulation(config.engine.dtype, "engine.dtype")
    data_group, objective = groups.data(), config.build_objective()
    loader = batch_loader(config.data, objective, dist.get_rank(data_group), config.layout.dp)
    engine = Engine(objective, config.model, vocabulary, config.layout, config.run.seed, config.optimizer, config.engine)
    groups.set_timeouts(config.run.timeout_s)
    if config.run.init_from:
        init_from.load_weights(release.weights(config.run.init_from), engine.state)
    evaluation = Evaluation(config, vocabulary, engine, data_group) if config.evaluation.sources else None
    return Trainer(config, rank_info, vocabulary, engine, loader, evaluation, callbacks)
