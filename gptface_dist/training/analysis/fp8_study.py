"""Effect of FP8 attention on the loss: runs of several seeds with and without it, on the same data."""

import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from torch._C._distributed_c10d import HashStore

from gptface_dist.distributed.rank import RankInfo
from gptface_dist.errors import UserError
from gptface_dist.parallel import groups, libraries
from gptface_dist.parallel.layout import Layout
from gptface_dist.tokenizers.vocabulary import Vocabulary
from gptface_dist.training.callbacks.callback import Callback
from gptface_dist.training.config import Config
from gptface_dist.training.metrics import LOSS, terms
from gptface_dist.training.trainer import Trainer, build_trainer

KERNELS = ("sdpa", "fp8")
"""Attention kernels to compare: PyTorch's in the run's precision, and ours in FP8."""


@dataclass(frozen=True)
class Gap:
    """Held-out losses (nats) of runs with and without FP8 attention, by seed."""

    plain: list[float]
    """Loss of each seed without FP8."""
    fp8: list[float]
    """Loss of each seed with FP8, in the same order."""

    @property
    def gap(self) -> float:
        """Difference of the means; positive if FP8 is worse."""
        return statistics.mean(self.fp8) - statistics.mean(self.plain)

    @property
    def noise(self) -> float:
        """Standard error of the difference of the means, from the variance over seeds."""
        return math.sqrt((statistics.variance(self.plain) + statistics.variance(self.fp8)) / len(self.plain))

    def within_noise(self) -> bool:
        """Whether the gap is at most twice its standard error."""
        return math.isfinite(self.gap) and abs(self.gap) <= 2 * self.noise


class LastEvaluation(Callback):
    """Keeps the metrics of the last evaluation, and calls ``step`` after each step."""

    def __init__(self, step: Callable[[], None]):
        self._step = step
        self.record: dict[str, float] = {}

    def after_step(self, run: Trainer, record: dict[str, float]) -> None:
        """Report a step."""
        self._step()

    def after_evaluation(self, run: Trainer, record: dict[str, float]) -> None:
        """Store the metrics."""
        self.record = record


def prepared(config: Config) -> Config:
    """The configuration for one process, with one evaluation, at the end; :class:`UserError` without held-out data."""
    if not config.evaluation.sources:
        raise UserError("evaluation.sources is empty: the losses that are compared are those on held-out data")
    evaluation = replace(config.evaluation, interval=config.run.steps)
    return replace(config, layout=Layout(zero=0), evaluation=evaluation, data=replace(config.data, workers=0))


def compare(
    config: Config,
    vocabulary: Vocabulary,
    seeds: Sequence[int],
    step: Callable[[], None],
    done: Callable[[str, int, float], None],
) -> dict[str, Gap]:
    """Train once for each seed of initial weights and each of :data:`KERNELS`, on the same batches; returns the gap by loss.

    ``config`` must be :func:`prepared`. Calls ``step()`` after every step and ``done(kernel, seed, loss)`` after every run.
    Creates and destroys process groups of this one process.
    """
    if len(seeds) < 2:
        raise UserError(f"at least 2 seeds are needed to know what another seed changes, got {len(seeds)}")
    records: dict[str, list[dict[str, float]]] = {kernel: [] for kernel in KERNELS}
    groups.join(RankInfo(), HashStore(), config.run.timeout_s)
    with libraries.quiet_imports():
        groups.start(config.layout, 0, config.run.timeout_s)
    for seed, kernel in itertools.product(seeds, KERNELS):
        records[kernel].append(train(config, vocabulary, kernel, seed, step))
        done(kernel, seed, records[kernel][-1]["loss"])
    groups.stop_layout()
    groups.stop()
    names = ["loss", *(LOSS + term for term in terms(records["fp8"]))]
    return {name: Gap(*([record[name] for record in records[kernel]] for kernel in KERNELS)) for name in names}


def train(config: Config, vocabulary: Vocabulary, kernel: str, seed: int, step: Callable[[], None]) -> dict[str, float]:
    """Train one run; returns its held-out metrics at the end."""
    attention = replace(config.engine.attention, kernel=kernel)
    run_config = replace(config, engine=replace(config.engine, attention=attention), run=replace(config.run, seed=seed))
    evaluation = LastEvaluation(step)
    trainer = build_trainer(run_config, vocabulary, RankInfo(), [evaluation])
    trainer.train()
    trainer.engine.close()
    return evaluation.record
