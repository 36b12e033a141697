"""The training loop: read a step's data, do an optimizer step, let the hooks act.

``prepare`` shows the order in which a run is put together; ``Trainer.train`` is the loop.
"""

import contextlib
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch.distributed as dist

from gptface_dist import release
from gptface_dist.data.training import TokenLoader, token_loader
from gptface_dist.distributed.rank import RankInfo
from gptface_dist.distributed.watchdog import Watchdog
from gptface_dist.engine.engine import Engine, StepResult
from gptface_dist.engine.state import EngineState
from gptface_dist.errors import UserError
from gptface_dist.model.parameters import count
from gptface_dist.parallel import groups, libraries
from gptface_dist.tokenizers.vocabulary import Vocabulary
from gptface_dist.training import init_from
from gptface_dist.training.callbacks.callback import Hook
from gptface_dist.training.config import Config
from gptface_dist.training.evaluation import Evaluation
from gptface_dist.training.meter import Meter, loss_metrics
from gptface_dist.training.state import RunState


class Trainer:
    """One run on one rank."""

    def __init__(
        self,
        config: Config,
        rank_info: RankInfo,
        vocabulary: Vocabulary,
        engine: Engine,
        loader: TokenLoader,
        evaluation: Evaluation | None,
        hooks: Sequence[Hook],
    ):
        self.config, self.rank_info, self.engine, self.vocabulary = config, rank_info, engine, vocabulary
        self.hooks = hooks
        self.folder = Path(config.run.folder)
        self.parameters = count(config.model, vocabulary)
        """Trainable values of the whole model."""
        self.state = RunState()
        """Where the run stands; a hook may replace it in ``start``."""
        self.stopped_by = ""
        """Why a hook asked to stop; empty while none did."""
        self._loader, self._evaluation = loader, evaluation
        self._meter = Meter(config.model, vocabulary, config.layout, config.engine.dtype, engine.device)

    def stop(self, reason: str) -> None:
        """Stop after the present step. All ranks must ask at the same step."""
        self.stopped_by = reason

    def train(self) -> None:
        """Go on from ``state`` to the last step."""
        with contextlib.ExitStack() as ending:
            for hook in self.hooks:
                ending.callback(hook.close, self)
                hook.start(self)
            self.engine.before_update, self.engine.steps = self._meter.mark, self.state.step
            steps = self._loader.steps(self.state.position)
            while self.state.step < self.config.run.steps and not self.stopped_by:
                for hook in self.hooks:
                    hook.before_step(self)
                self._meter.begin()
                items, position = next(steps)
                self._meter.mark()
                batches = [item.tensors(self.engine.device) for item in items]
                lr = self.config.optimizer.lr * self.config.schedule.factor(self.state.step, self.config.run.steps)
                self.engine.set_lr(lr)
                result = self.engine.step(batches)
                check_finite(self.state.step, result)
                record = {"loss": result.loss, **loss_metrics(result.sums), "norm": result.norm, "lr": lr}
                record["gathered_bytes"] = result.gathered_bytes
                record |= self._meter.end(result)
                record |= {"bad_samples": self._loader.bad, "skipped_samples": self._loader.skipped}
                self.state = replace(
                    self.state,
                    step=self.state.step + 1,
                    position=position,
                    samples=self.state.samples + self._meter.samples,
                    tokens=self.state.tokens + self._meter.tokens,
                    seconds=self.state.seconds + record["seconds"],
                )
                for hook in self.hooks:
                    hook.after_step(self, record)
                self._evaluate()
            for hook in self.hooks:
                hook.stop(self)

    def _evaluate(self) -> None:
        last = self.state.step == self.config.run.steps or self.stopped_by
        if self._evaluation is None or (self.state.step % self.config.evaluation.every and not last):
            return
        record = self._evaluation()
        for hook in self.hooks:
            hook.after_evaluation(self, record)


def check_finite(step: int, result: StepResult) -> None:
    """Refuse to go on with a loss or gradient that is no number; nothing of it reaches a checkpoint. All ranks agree."""
    if not (math.isfinite(result.loss) and math.isfinite(result.norm)):
        found = f"loss {result.loss:g}, norm of the gradient {result.norm:g}"
        raise UserError(
            f"step {step}: {found}: the run ends here, its last checkpoint is sound; a lower optimizer.lr, "
            "a longer schedule.warmup or other data may help"
        )


def prepare(config: Config, vocabulary: Vocabulary, watchdog: Watchdog, hooks: Sequence[Hook]) -> Trainer:
    """Put a run that was checked together on this rank: process groups, then the rest."""
    groups.join(watchdog.rank_info, watchdog.store, config.run.timeout_s)
    with libraries.hushed():
        groups.start(config.layout, config.run.seed, config.run.timeout_s)
    return assemble(config, vocabulary, watchdog.rank_info, hooks)


def assemble(config: Config, vocabulary: Vocabulary, rank_info: RankInfo, hooks: Sequence[Hook]) -> Trainer:
    """Put data, engine and hooks of a run together on this rank, whose process groups exist."""
    data_group = groups.data()
    loader = token_loader(config.data, dist.get_rank(data_group), config.layout.dp)
    engine = Engine(config.model, vocabulary, config.layout, config.run.seed, config.optimizer, config.loss, config.engine)
    if config.run.init_from:
        init_from.load(release.weights(config.run.init_from), EngineState(engine))
    evaluation = Evaluation(config, vocabulary, engine, data_group) if config.evaluation.sources else None
    return Trainer(config, rank_info, vocabulary, engine, loader, evaluation, hooks)
