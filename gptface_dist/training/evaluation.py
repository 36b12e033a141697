"""Evaluation on held-out data: the same global batches every time, with masking and pairing as in training."""

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from gptface_dist.engine.engine import Engine
from gptface_dist.tokenizers.vocabulary import Vocabulary
from gptface_dist.training.checks import held_out
from gptface_dist.training.config import Config
from gptface_dist.training.data import batch_loader
from gptface_dist.training.metrics import CONSTANT_GUESS, loss_metrics


class Evaluation:
    """Computes held-out losses: each data-parallel rank evaluates its part of the batches. Calling it is collective."""

    def __init__(self, config: Config, vocabulary: Vocabulary, engine: Engine, data_group: dist.ProcessGroup):
        self._options, self._vocabulary, self._engine, self._group = config.evaluation, vocabulary, engine, data_group
        ranks = dist.get_world_size(data_group)
        self._loader = batch_loader(held_out(config), engine.objective, dist.get_rank(data_group), ranks)
        self._guess: dict[str, float] | None = None

    def __call__(self) -> dict[str, float]:
        """``loss``, ``loss/TERM``, ``accuracy/TERM``, and ``constant_guess/TERM``: the least loss of one constant
        prediction on the same targets. Losses in nats.
        """
        objective = self._engine.objective
        total: Tensor | None = None
        targets = np.zeros(1, dtype=np.int64)
        for step in range(self._options.batches):
            batches, _ = self._loader.read(step)
            for batch in batches:
                targets = targets + objective.targets(batch, self._vocabulary)
            sums = self._engine.evaluate([batch.tensors(self._engine.device) for batch in batches])
            total = sums if total is None else total + sums
        assert total is not None
        total = total.cpu()
        if self._guess is None:
            all_targets = torch.as_tensor(targets).to(self._engine.device)
            dist.all_reduce(all_targets, group=self._group)
            guess = objective.constant_guess(all_targets.cpu().numpy(), self._vocabulary)
            self._guess = {f"{CONSTANT_GUESS}{name}": value for name, value in guess.items()}
        return {"loss": self._engine.loss(total), **loss_metrics(objective, total), **self._guess}
