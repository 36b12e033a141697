"""Evaluation on held-out data: the same global batches every time, masked and paired as in training."""

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from gptface_dist.data.training import token_loader
from gptface_dist.engine.engine import Engine
from gptface_dist.sequence import IGNORE
from gptface_dist.tokenizers.vocabulary import Vocabulary
from gptface_dist.training.checks import held_out
from gptface_dist.training.config import Config
from gptface_dist.training.meter import loss_metrics


class Evaluation:
    """Held-out losses of one data-parallel rank's part, summed over all."""

    def __init__(self, config: Config, vocabulary: Vocabulary, engine: Engine, data_group: dist.ProcessGroup):
        self._options, self._vocabulary, self._engine, self._group = config.evaluation, vocabulary, engine, data_group
        self._loader = token_loader(held_out(config), dist.get_rank(data_group), dist.get_world_size(data_group))
        self._entropy: dict[str, float] | None = None

    def __call__(self) -> dict[str, float]:
        """``loss``, ``loss/..``, ``accuracy/..`` of each modality, and ``unigram/..``: the least loss that the same guess for
        every masked token could have on these very targets.
        """
        total: Tensor | None = None
        counts = np.zeros(self._vocabulary.size)
        for step in range(self._options.batches):
            batches, _ = self._loader.read(step)
            for batch in batches:
                counts += np.bincount(batch.labels[batch.labels != IGNORE], minlength=len(counts))
            sums = self._engine.evaluate([batch.tensors(self._engine.device) for batch in batches])
            total = sums if total is None else total + sums
        assert total is not None
        total = total.cpu()
        if self._entropy is None:
            everywhere = torch.from_numpy(counts).to(self._engine.device)
            dist.all_reduce(everywhere, group=self._group)
            ids = self._vocabulary
            self._entropy = {
                f"unigram/{name}": entropy(everywhere[found.start : found.stop])
                for name, found in (("text", ids.text_range), ("image", ids.image_range))
            }
        return {"loss": self._engine.loss(total), **loss_metrics(total), **self._entropy}


def entropy(counts: Tensor) -> float:
    """Entropy in nats of the distribution that ``counts`` [K] are proportional to; 0 of no counts."""
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * shares.log()).sum())
